-- The indexes of the change log that are no constraint: how each is dropped and made again.
SELECT format('DROP INDEX %s', i.indexrelid::regclass), pg_get_indexdef(i.indexrelid)
  FROM pg_index i
 WHERE i.indrelid = 'core.tb_entity_change_log'::regclass AND NOT i.indisunique
