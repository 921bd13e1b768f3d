-- What the source holds of one window up to a settled pk. The digest of each row ties its key to its id, so a swap shows as well.
-- Nothing that is updated in place (nats_published_at, nats_event_id) enters it.
SELECT count(*), coalesce(sum(pk_entity_change_log), 0)::numeric,
       coalesce(bit_xor(('x' || left(md5(pk_entity_change_log::text || ':' || coalesce(id::text, '')), 16))::bit(64)::bigint), 0)
  FROM core.tb_entity_change_log
 WHERE created_at >= %(start)s::timestamptz AND created_at < %(end)s::timestamptz AND pk_entity_change_log <= %(settled_pk)s
