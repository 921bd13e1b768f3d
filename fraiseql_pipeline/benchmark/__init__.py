"""Measurements against references, for ``fraiseql-pipeline bench``, the asset checks and the documents.

What lives here: nothing but the names of its files; a case runs as a process of its own (``python -m``) and loads what it needs.

    report       figures, ratios, budgets
    comparison   short cases side by side: materialize, windows, conversion, one warm Flight read
    cases        the work of those, each in a process of its own
    flight       streams of our server and of others; ``servers`` start them, ``readers`` read
    live         what a follower gets, and what is served before it is published
"""
