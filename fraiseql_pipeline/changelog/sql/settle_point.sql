-- The newest pk whose transaction may still be open. Where the sequence may be read, its last value: keys that no visible row has yet are
-- settled with it. The newest row's key otherwise.
SELECT coalesce(max(pk_entity_change_log), 0)::bigint AS newest, clock_timestamp() AS at, NULL::bigint AS drawn FROM core.tb_entity_change_log
