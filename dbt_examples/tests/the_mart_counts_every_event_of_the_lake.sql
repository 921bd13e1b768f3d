-- Rows of the answer are failures: hours whose count differs between the lake and the mart. A window that is published while dbt
-- runs shows up here; the next run takes it in.
with in_lake as (select event_hour, count(*) as events from {{ ref('stg_events') }} group by event_hour),

in_mart as (select event_hour, sum(events) as events from {{ ref('fct_events_hourly') }} group by event_hour)

select event_hour, in_lake.events as lake_events, in_mart.events as mart_events
from in_lake
full outer join in_mart using (event_hour)
where in_lake.events is distinct from in_mart.events
