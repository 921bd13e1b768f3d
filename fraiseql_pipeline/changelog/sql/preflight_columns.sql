-- The columns of the change log with the type underneath a domain, however many lie over each other, and whether this role may read them.
SELECT a.attname::text,
       format_type(base.oid, NULL)                          AS type,
       has_column_privilege(a.attrelid, a.attnum, 'SELECT') AS readable
  FROM pg_attribute a
 CROSS JOIN LATERAL (WITH RECURSIVE layer AS (
                         SELECT t.oid, t.typtype, t.typbasetype FROM pg_type t WHERE t.oid = a.atttypid
                         UNION ALL
                         SELECT t.oid, t.typtype, t.typbasetype FROM layer JOIN pg_type t ON layer.typtype = 'd' AND t.oid = layer.typbasetype)
                     SELECT oid FROM layer WHERE typtype <> 'd') AS base
 WHERE a.attrelid = %(table)s AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY a.attnum
