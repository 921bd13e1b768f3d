"""The Dagster code location: what the library does, as assets, checks, schedules and sensors.

What lives here: thin definitions that hand windows to ``fraiseql_pipeline.pipeline`` and show what came back. What must not: SQL, rules,
Delta, decisions about data; the library works without any of this. Imports are relative, because a wheel carries the same modules as
``fraiseql_pipeline.assets``.
"""
