-- Before an append, in its transaction. Nothing is acknowledged that is not on disk, whatever the role's defaults are; appends come one after
-- the other, so that two of the same event cannot both miss the other's row; and the rows of a time are looked up by the index on it.
SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on'
                                        ELSE current_setting('synchronous_commit') END, true),
       set_config('enable_seqscan', 'off', true),
       set_config('enable_mergejoin', 'off', true),
       pg_advisory_xact_lock(hashtext('fraiseql-pipeline append'))
