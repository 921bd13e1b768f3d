"""The code location under the name that users have it by: ``fraiseql_pipeline.assets.definitions``.

What lives here: where to find it in a checkout. What must not: anything else; a wheel has the modules of ``/assets`` in this place, and this
file is not in it.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "assets")]
