select entity_type, entity_id, count(*) as states
from {{ ref('entities_current') }}
group by entity_type, entity_id
having count(*) > 1
