"""Sample events, and the databases they are written into: what a demo, a benchmark and the tests run on.

What lives here: which entities there are and what happens to them (``lives.py``), what their payloads say (``texts.py``, in the shapes
``typical.py`` and ``wide.py``), the events as one table (``sample.py``), and the way into a database (``fill.py``, rows by ``binary.py``).
What must not: anything that a change log of somebody's own needs.
"""
