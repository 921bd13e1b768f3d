-- The change log as FraiseQL's contract describes it, for the embedded Postgres, the samples and the tests.
-- Idempotent. A production database gets its table from FraiseQL; this file is never run against one.

CREATE SCHEMA IF NOT EXISTS core;

CREATE TABLE IF NOT EXISTS core.tb_entity_change_log (
    pk_entity_change_log bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    object_type          text        NOT NULL,
    modification_type    text        NOT NULL,                        -- no CHECK upstream: any text may stand here
    id                   uuid        NOT NULL DEFAULT gen_random_uuid(), -- not unique by index
    created_at           timestamptz NOT NULL DEFAULT now(),          -- start of the transaction, not its commit
    tenant_id            uuid,
    fk_customer_org      bigint,
    fk_contact           bigint,
    object_id            uuid,
    object_data          jsonb,
    object_data_before   jsonb,
    updated_fields       text[],
    "cascade"            jsonb,
    duration_ms          integer,
    started_at           timestamptz,
    commit_time          timestamptz,                                 -- clock at the insert, whatever its name says
    seq                  bigint,
    actor_type           text,
    acting_for           uuid,
    schema_version       text,
    trace_id             text,
    trace_context        jsonb,
    change_status        text,
    extra_metadata       jsonb,
    nats_published_at    timestamptz,
    nats_event_id        uuid
);

CREATE SEQUENCE IF NOT EXISTS core.seq_entity_change_log OWNED BY core.tb_entity_change_log.seq;
ALTER TABLE core.tb_entity_change_log ALTER COLUMN seq SET DEFAULT nextval('core.seq_entity_change_log');

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint
                    WHERE conrelid = 'core.tb_entity_change_log'::regclass AND conname = 'chk_entity_change_log_actor_type') THEN
        ALTER TABLE core.tb_entity_change_log ADD CONSTRAINT chk_entity_change_log_actor_type
            CHECK (actor_type IS NULL OR actor_type IN ('human_user', 'service_account', 'ai_agent', 'system_job')) NOT VALID;
    END IF;
END
$$;

CREATE INDEX IF NOT EXISTS idx_entity_log_created    ON core.tb_entity_change_log (created_at);
CREATE INDEX IF NOT EXISTS idx_entity_log_duration   ON core.tb_entity_change_log (duration_ms DESC);
CREATE INDEX IF NOT EXISTS idx_entity_log_type       ON core.tb_entity_change_log (object_type);
CREATE INDEX IF NOT EXISTS idx_entity_log_tenant_seq ON core.tb_entity_change_log (tenant_id, seq);
CREATE INDEX IF NOT EXISTS idx_entity_log_type_seq   ON core.tb_entity_change_log (object_type, seq);

-- Deny by default: the owner and BYPASSRLS roles see all, everyone else one tenant at most.
ALTER TABLE core.tb_entity_change_log ENABLE ROW LEVEL SECURITY;
REVOKE ALL ON core.tb_entity_change_log FROM PUBLIC;
DROP POLICY IF EXISTS p_change_log_tenant_read ON core.tb_entity_change_log;
CREATE POLICY p_change_log_tenant_read ON core.tb_entity_change_log FOR SELECT
    USING (tenant_id = nullif(current_setting('fraiseql.tenant_id', true), '')::uuid);
DROP POLICY IF EXISTS p_change_log_insert ON core.tb_entity_change_log;
CREATE POLICY p_change_log_insert ON core.tb_entity_change_log FOR INSERT WITH CHECK (true);

-- Capture of writes that go past FraiseQL. Arguments: type name [, key column = id [, tenant column = tenant_id [, pre-image = false]]].
-- Attach it AFTER INSERT / UPDATE / DELETE, FOR EACH STATEMENT, with the transition tables named old_table and new_table.
CREATE OR REPLACE FUNCTION core.fn_entity_change_log_capture() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = core, pg_catalog, pg_temp AS $$
DECLARE
    entity      text := TG_ARGV[0];
    key_name    text := coalesce(TG_ARGV[1], 'id');
    tenant_name text := coalesce(TG_ARGV[2], 'tenant_id');
    pre_image   boolean := coalesce(TG_ARGV[3], 'false')::boolean;
    uuid_shape  constant text := '^[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$';
    images      text;
BEGIN
    IF current_setting('fraiseql.cdc_mediated', true) = 'on' THEN
        RETURN NULL;                          -- FraiseQL writes this change itself
    END IF;
    images := CASE TG_OP
        WHEN 'INSERT' THEN 'SELECT NULL::jsonb AS before, to_jsonb(n) AS after FROM new_table n'
        WHEN 'DELETE' THEN 'SELECT to_jsonb(o) AS before, NULL::jsonb AS after FROM old_table o'
        ELSE format('SELECT to_jsonb(o) AS before, to_jsonb(n) AS after FROM new_table n JOIN old_table o ON n.%1$I = o.%1$I', key_name)
    END;
    EXECUTE format($capture$
        INSERT INTO core.tb_entity_change_log (object_type, modification_type, object_id, tenant_id, object_data, object_data_before,
                                               commit_time, actor_type, acting_for, schema_version, change_status, extra_metadata)
        SELECT $1, $2, (current ->> $3)::uuid,
               CASE WHEN current ->> $4 ~ $6 THEN (current ->> $4)::uuid ELSE nullif(current_setting('fraiseql.tenant_id', true), '')::uuid END,
               after, CASE WHEN $5 THEN before END,
               clock_timestamp(), nullif(current_setting('fraiseql.actor_type', true), ''),
               nullif(current_setting('fraiseql.acting_for', true), '')::uuid, nullif(current_setting('fraiseql.schema_version', true), ''),
               'success', '{"cdc_source": "fallback_trigger"}'::jsonb
          FROM (SELECT before, after, coalesce(after, before) AS current FROM (%s) AS images) AS changes
         WHERE current ->> $3 ~ $6
    $capture$, images) USING entity, TG_OP, key_name, tenant_name, pre_image, uuid_shape;
    RETURN NULL;
END
$$;
