-- One batch of uploaded events, those the log does not hold yet; the number of rows is how many those were. An event is known when its id
-- stands at its time for its tenant: the index on created_at finds the few rows of that time, and the id has none.
-- Each parameter is a column, its values joined by a character that none of them can hold; an empty one is null.
WITH sent AS MATERIALIZED (
    SELECT *
      FROM unnest(string_to_array(%(event_id)s, E'\x01')::uuid[], string_to_array(%(event_type)s, E'\x01'),
                  string_to_array(%(entity_type)s, E'\x01'), string_to_array(%(entity_id)s, E'\x01')::uuid[],
                  string_to_array(%(timestamp)s, E'\x01')::timestamptz[], string_to_array(%(data)s, E'\x01'),
                  string_to_array(%(user_id)s, E'\x01', '')::bigint[], string_to_array(%(org_id)s, E'\x01', '')::uuid[])
           WITH ORDINALITY AS s (id, verb, object_type, object_id, created_at, data, fk_contact, tenant_id, number)
), known AS MATERIALIZED (
    SELECT l.created_at, l.id, l.tenant_id
      FROM (SELECT DISTINCT created_at FROM sent) AS times
      JOIN core.tb_entity_change_log l ON l.created_at = times.created_at
)
INSERT INTO core.tb_entity_change_log (object_type, modification_type, id, created_at, tenant_id, fk_contact, object_id,
                                       object_data, object_data_before, commit_time, extra_metadata)
SELECT object_type, verb, id, created_at, tenant_id, fk_contact, object_id,
       CASE WHEN verb <> 'DELETE' THEN data::jsonb END,
       CASE WHEN verb = 'DELETE' THEN data::jsonb END,
       clock_timestamp(), jsonb_build_object('transport', 'flight', 'flight_user_id', %(producer)s::text)
  FROM sent
 WHERE NOT EXISTS (SELECT FROM known k WHERE k.created_at = sent.created_at AND k.id::text = sent.id::text
                                         AND k.tenant_id::text IS NOT DISTINCT FROM sent.tenant_id::text)
 ORDER BY number
