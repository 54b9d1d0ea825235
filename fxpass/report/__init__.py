"""A plan as one page of HTML: what is split, what it costs, and what is predicted."""
