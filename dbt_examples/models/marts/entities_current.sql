-- The newest known state of every entity that was not deleted.
with ranked as (

    select
        entity_type,
        entity_id,
        tenant_id,
        event_type,
        event_at as changed_at,
        status,
        total_amount,
        payload,
        row_number() over (partition by entity_type, entity_id order by event_at desc, pk desc) as age,
        count(*) over (partition by entity_type, entity_id) as changes
    from {{ ref('stg_events') }}
    where event_type in ('Created', 'Updated', 'Deleted')

)

select entity_type, entity_id, tenant_id, changed_at, changes, status, total_amount, payload
from ranked
where age = 1 and event_type <> 'Deleted'
