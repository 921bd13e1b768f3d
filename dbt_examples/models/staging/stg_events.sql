-- Events as the models want them: times named for what they are, and the payload's common fields typed. One row per event: the lake holds
-- each exactly once, so nothing is deduplicated here. Within a window no id stands twice; an id that was used again in another window is an
-- event of its own, and the source's tests warn of it.
{%- set timestamp, data = adapter.quote('timestamp'), adapter.quote('data') -%}
{#- In the engine's own quotes: "timestamp" is a text, and no column, to Spark and BigQuery. #}
select
    event_id,
    event_type,
    entity_type,
    entity_id,
    {{ timestamp }} as event_at,
    date_trunc('hour', {{ timestamp }}) as event_hour,
    event_date,
    org_id as tenant_id,
    user_id,
    pk,
    commit_time as committed_at,
    {{ json_text('data', 'status') }} as status,
    try_cast({{ json_text('data', 'total') }} as decimal(18, 2)) as total_amount,
    length({{ data }}) as payload_characters,
    {{ data }} as payload
from {{ lake('events') }}
