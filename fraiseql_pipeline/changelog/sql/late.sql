-- Late events per published window: rows above the window's settled pk. One range scan of the primary key above the lowest of them.
-- {at}: created_at as the contract means it.
SELECT published.ordinal, count(*)
  FROM (SELECT {at} AS at, pk_entity_change_log AS pk
          FROM core.tb_entity_change_log
         WHERE pk_entity_change_log > %(above)s
           AND created_at >= %(start)s::timestamptz AND created_at < %(end)s::timestamptz) AS changes
  JOIN unnest(%(starts)s::timestamptz[], %(pks)s::bigint[]) WITH ORDINALITY AS published (start, settled_pk, ordinal)
    ON published.start = date_trunc(%(size)s, changes.at, 'UTC') AND changes.pk > published.settled_pk
 GROUP BY published.ordinal
