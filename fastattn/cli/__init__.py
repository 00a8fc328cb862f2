"""Commands of ``python -m fastattn``. Needs the extra ``fastattn[cli]`` (``demo``:
``fastattn[demo]``); nothing imports it.

``app`` has the commands and their options and imports no torch; each other module is a command, or
a part of one, and is imported when that runs.
"""
