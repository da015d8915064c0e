"""The word pools of the evaluation tasks.

Keys and values never occur in the filler text, so that an answer can only come from the sentence that states it. All
pools are disjoint; the embedded model's tokenizer holds every one of these words as a single token.
"""


def _pool(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KEYS = _pool(
    """
    antelope badger beaver bison buffalo camel cheetah cobra condor cougar coyote crane cricket crow deer dingo
    dolphin donkey eagle egret falcon ferret finch gazelle gecko gibbon giraffe goose gopher gorilla hamster hare
    hawk hedgehog heron hippo horse hyena ibis iguana jackal jaguar kitten koala lemur leopard lizard llama lobster
    lynx macaw magpie mammoth marten meerkat mole monkey moose mouse newt ocelot octopus orca osprey otter owl
    oyster panda panther parrot peacock pelican penguin pheasant pigeon pony porcupine puffin puma python quail
    rabbit raccoon raven reindeer robin salmon scorpion seal shark sheep shrimp skunk sloth snail sparrow spider
    squid squirrel stork swallow swan tapir termite tiger toad toucan trout turkey turtle viper vulture walrus wasp
    weasel whale wolf wombat yak zebra anchor anvil arrow barrel basket beacon bell blanket bottle bracelet brick
    bucket button cabinet candle cannon canvas carpet cart chain chair chest clock compass cradle crown cushion
    dagger drum easel engine envelope fan feather flag flute fork frame funnel gate glove guitar hammer harp hatchet
    helmet hinge hook jar kettle kite ladder lantern lens lever lock locket mallet medal mirror mug nail needle net
    oar organ oven paddle parcel pedal pencil piano pillow pipe pitcher plough pulley pump quilt radio raft rake
    ribbon ring robe rope saddle satchel scarf shield shovel sickle sled spear spoon stove sword table tent thimble
    torch trumpet umbrella vase violin wagon wallet wheel whistle window zipper
    """
)

VALUES = _pool(
    """
    amber amethyst aqua auburn azure beige bronze burgundy carmine cerise chrome citrine cobalt copper coral cream
    crimson cyan denim diamond ebony emerald fawn garnet ginger golden granite graphite indigo iron ivory jade
    jasper jet khaki lapis lavender lead lilac linen magenta mahogany maroon marble mauve mercury mint mocha mustard
    navy nickel ochre olive onyx opal orchid pearl peridot pewter pink platinum plum quartz rose ruby russet rust
    saffron sapphire scarlet sepia sienna silver slate tan tawny teal tin titanium topaz tungsten turquoise umber
    vanilla vermilion violet walnut zinc almond apple apricot avocado banana barley basil bean beet biscuit bread
    broccoli butter cabbage cake carrot cashew celery cheese cherry chestnut chili chive cinnamon clove cocoa
    coconut coffee cookie corn cranberry cucumber cumin currant custard date dill fennel fig garlic grape guava
    hazelnut honey jam kale kiwi leek lemon lentil lettuce lime mango maple melon millet molasses muffin mushroom
    noodle nutmeg oat onion orange oregano papaya paprika parsley pasta pastry peach peanut pear pecan pepper pickle
    pineapple pistachio pizza plantain potato pretzel pumpkin quince radish raisin rhubarb rice rosemary rye sage
    salad salt sesame sorbet soup spinach squash sugar syrup tea thyme toffee tomato truffle turnip waffle wasabi
    wheat yam yogurt zucchini
    """
)

SPEAKERS = _pool(
    """
    baker captain chorus clerk committee crowd farmer judge jury pilot sailor teacher
    """
)

ADJECTIVES = _pool(
    """
    ancient bitter blue brave bright broad busy calm careful cheap clean clever cold cool dark deep distant dry
    early easy empty famous fast final foreign fresh gentle grand great green grey happy heavy hidden high hollow
    hungry kind large late lazy little lonely long loud low modern narrow new noisy old open pale patient plain
    polite poor proud quick quiet rare rich rough round sharp short silent simple slow small smooth soft solid
    strange strong sudden sweet tall thick thin tired warm weak wet white wide wild wise young
    """
)

NOUNS = _pool(
    """
    actor artist aunt bank bay bench boat book border bridge brother building camp castle child church city cloud
    coast cottage country cousin daughter desert doctor door dream driver evening family father field fire forest
    friend garden guest hall harbour hill holiday hospital hotel house island journey king kitchen lake lawyer
    letter library market meadow meeting message minister moon morning mother mountain museum music neighbour night
    novel nurse office painter palace park party path picture poem poet port queen rain river road room school
    scientist sea season ship singer sister sky snow soldier son song spring station stone storm story stranger
    street student summer sun theatre tower town traveller tree uncle valley village visitor voice wall water wind
    winter woman writer
    """
)

VERBS = _pool(
    """
    admired avoided built called carried changed chose covered crossed described discovered drew enjoyed entered
    examined feared followed forgot found greeted guarded helped ignored inspired joined kept left liked lost loved
    met missed moved needed noticed opened painted passed praised protected reached remembered repaired saw served
    shared sold studied surprised taught thanked touched trusted visited wanted warned watched welcomed
    """
)

ADVERBS = _pool(
    """
    again almost already always carefully finally gladly never often once quickly rarely silently slowly soon
    sometimes suddenly today twice yesterday
    """
)

PREPOSITIONS = _pool(
    """
    above across after against along around before behind below beside beyond inside near outside past through
    towards under without within
    """
)

POOLS: dict[str, tuple[str, ...]] = {
    "keys": KEYS,
    "values": VALUES,
    "speakers": SPEAKERS,
    "adjectives": ADJECTIVES,
    "nouns": NOUNS,
    "verbs": VERBS,
    "adverbs": ADVERBS,
    "prepositions": PREPOSITIONS,
}
"""Every pool by name."""
