"""Commands of ``python -m fastattn``. Needs the extras ``fastattn[demo]``; nothing imports it."""
