-- The columns of the change log with the type underneath a domain, and whether this role may read them.
SELECT a.attname::text,
       format_type(CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.oid END, NULL) AS type,
       has_column_privilege(a.attrelid, a.attnum, 'SELECT')                         AS readable
  FROM pg_attribute a
  JOIN pg_type t ON t.oid = a.atttypid
 WHERE a.attrelid = %(table)s AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY a.attnum
