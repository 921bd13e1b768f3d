-- Newest pk of the log and of its sequence, read in this order: a visible pk was drawn before the snapshot, so it cannot be ahead.
SELECT (SELECT max(pk_entity_change_log) FROM core.tb_entity_change_log)::bigint AS newest,
       (SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM {sequence}) AS drawn
