{#- The text at a top-level key of a JSON document that is stored as text; null where the key is missing or JSON null.

    A column of type `json` may hold half a surrogate pair (`"\ud83d"`, a text that was cut within an emoji), which Postgres prints as it
    stands. DuckDB reads no such document and would end the query: there its fields are null.
-#}
{% macro json_text(column, key) -%}
  {{ return(adapter.dispatch('json_text')(column, key)) }}
{%- endmacro %}

{% macro default__json_text(column, key) -%}
  json_extract_scalar({{ column }}, '$.{{ key }}')
{%- endmacro %}

{% macro duckdb__json_text(column, key) -%}
  case when json_valid({{ column }}) then json_extract_string({{ column }}, '$.{{ key }}') end
{%- endmacro %}

{% macro clickhouse__json_text(column, key) -%}
  nullIf(JSONExtractString({{ column }}, '{{ key }}'), '')
{%- endmacro %}

{% macro spark__json_text(column, key) -%}
  get_json_object({{ column }}, '$.{{ key }}')
{%- endmacro %}

{% macro snowflake__json_text(column, key) -%}
  try_parse_json({{ column }}):{{ key }}::string
{%- endmacro %}
