"""Requests: what is asked, as tokens and parameters; what a request comes to hold; and what is answered."""
