"""``python -m fraiseql_pipeline`` is the command line ``fraiseql-pipeline``."""

from fraiseql_pipeline.cli import main

main(prog_name="python -m fraiseql_pipeline")
