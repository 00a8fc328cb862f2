"""Benches of fastattn: `make bench`, or `python -m bench.attention --case NAME` while tuning."""
