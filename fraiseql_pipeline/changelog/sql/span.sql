-- First and last time of an event that a window can hold: two looks at the ends of the index on created_at.
SELECT min(created_at), max(created_at) FROM core.tb_entity_change_log
 WHERE created_at >= '0001-01-01 00:00:00+00'::timestamptz AND created_at < '9999-12-31 00:00:00+00'::timestamptz
