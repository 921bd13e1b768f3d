{#- One Delta table of the lake, in the words of the engine that runs the models. `source()` is always called, so lineage, source
    tests and freshness are the same everywhere.

    duckdb       through dbt-duckdb's delta plugin (models/sources.yml); run by the tests
    clickhouse   the deltaLake table function; from ClickHouse's documentation
    spark, databricks   the path as a table; from Spark's documentation
    any other    the registered relation that models/sources.yml names (Trino, Snowflake, BigQuery)
-#}
{% macro lake(table) -%}
  {%- set relation = source('lake', table) -%}
  {%- set path = env_var('FRAISEQL_LAKE_URI', '../.fraiseql/lake') ~ '/' ~ table -%}
  {%- if target.type == 'clickhouse' -%}
    {{ 'deltaLake' if '://' in path else 'deltaLakeLocal' }}('{{ path }}')
  {%- elif target.type in ('spark', 'databricks') -%}
    delta.`{{ path }}`
  {%- else -%}
    {{ relation }}
  {%- endif -%}
{%- endmacro %}
