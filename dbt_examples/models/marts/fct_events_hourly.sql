-- Events per hour, tenant, entity type and event type. An hour is replaced as a whole, as the lake's windows are, so a run can be
-- repeated and a late event corrects its hour.
--
-- Which hours an incremental run builds is read off the two sides and not guessed from a clock: those whose number of events or highest
-- pk differs between the lake and this table. The comparison reads two narrow columns of the days in `lookback_days`.
{{
    config(
        materialized='incremental',
        incremental_strategy='delete+insert',
        unique_key='event_hour',
        on_schema_change='fail',
    )
}}

with events as (

    select * from {{ ref('stg_events') }}
    {%- if is_incremental() %}
    {#- A literal, so that the engine skips the files of older days. #}
    {%- set newest = run_query('select max(event_hour) from ' ~ this).columns[0].values()[0] %}
    {%- if newest %}
    where event_date >= date '{{ (newest - modules.datetime.timedelta(days=var("lookback_days"))).date() }}'
    {%- endif %}
    {%- endif %}

)

{%- if is_incremental() %},

in_lake as (

    select event_hour, count(*) as events, max(pk) as last_pk from events group by event_hour

),

in_mart as (

    select event_hour, sum(events) as events, max(last_pk) as last_pk from {{ this }} group by event_hour

),

changed as (

    select in_lake.event_hour
    from in_lake
    left join in_mart on in_mart.event_hour = in_lake.event_hour
    where in_mart.event_hour is null or in_mart.events <> in_lake.events or in_mart.last_pk <> in_lake.last_pk

)
{%- endif %}

select
    event_hour,
    tenant_id,
    entity_type,
    event_type,
    count(*) as events,
    count(distinct entity_id) as entities,
    count(distinct user_id) as users,
    sum(payload_characters) as payload_characters,
    min(event_at) as first_event_at,
    max(event_at) as last_event_at,
    max(pk) as last_pk
from events
{%- if is_incremental() %}
where event_hour in (select event_hour from changed)
{%- endif %}
group by event_hour, tenant_id, entity_type, event_type
