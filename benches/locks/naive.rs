//! Two common ways of keeping a lock in a table, to be drawn beside ours. They commit as the library does, the
//! taking durably and the release without waiting for the disk, so that what differs is the shape of the table.

use postgres::{Client, Statement};

use crate::bare;
use crate::server::{Table, unique_name};

const DDL: &str = "CREATE TABLE $T (lock_id text COLLATE \"C\" PRIMARY KEY, version bigint NOT NULL,
    owner_id text NOT NULL, lease_expire_time timestamptz NOT NULL, released_at timestamptz)";
const NO_WAIT: &str = "set_config('synchronous_commit', 'off', true) IS NOT NULL";

pub struct Naive {
    client: Client,
    table: String,
    take: Statement,
    release: Statement,
}

impl Naive {
    /// A row is there while the lock is held.
    pub fn inserted_and_deleted(table: &Table) -> Naive {
        Naive::new(
            table,
            None,
            "INSERT INTO $T VALUES ('lock', 1, 'naive', clock_timestamp() + interval '30 s', NULL)
             ON CONFLICT DO NOTHING",
            &format!("DELETE FROM $T WHERE lock_id = 'lock' AND owner_id = 'naive' AND {NO_WAIT}"),
        )
    }

    /// The row of a lock stays, and is compared and set.
    pub fn updated_in_place(table: &Table) -> Naive {
        Naive::new(
            table,
            Some("INSERT INTO $T VALUES ('lock', 0, '', clock_timestamp(), clock_timestamp())"),
            "UPDATE $T SET version = version + 1, owner_id = 'naive', released_at = NULL,
                 lease_expire_time = clock_timestamp() + interval '30 s'
             WHERE lock_id = 'lock' AND (released_at IS NOT NULL OR lease_expire_time <= clock_timestamp())",
            &format!(
                "UPDATE $T SET released_at = clock_timestamp()
                 WHERE lock_id = 'lock' AND owner_id = 'naive' AND released_at IS NULL AND {NO_WAIT}"
            ),
        )
    }

    fn new(beside: &Table, first: Option<&str>, take: &str, release: &str) -> Naive {
        let mut client = bare::connect(beside);
        let table = format!("public.{}", unique_name());
        let named = |sql: &str| sql.replace("$T", &table);
        client.batch_execute(&named(DDL)).expect("create a table");
        if let Some(first) = first {
            client.batch_execute(&named(first)).expect("insert the row");
        }
        let take = client.prepare(&named(take)).expect("prepare");
        let release = client.prepare(&named(release)).expect("prepare");
        Naive { client, table, take, release }
    }

    pub fn take_and_release(&mut self) {
        for statement in [&self.take, &self.release] {
            assert_eq!(self.client.execute(statement, &[]).expect("run a statement"), 1);
        }
    }
}

impl Drop for Naive {
    fn drop(&mut self) {
        self.client.batch_execute(&format!("DROP TABLE {}", self.table)).ok();
    }
}
