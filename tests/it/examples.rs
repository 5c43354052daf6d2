//! The examples as a user runs them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::{Command, Output};

use storage_lock::StorageLock;
use uuid::Uuid;

use crate::support::{client, dsn};

/// Built by `cargo test`, beside this binary.
fn example(name: &str, arguments: &[&str], dsn: &str) -> Output {
    let this = std::env::current_exe().unwrap();
    let path: PathBuf = this.parent().unwrap().parent().unwrap().join("examples").join(name);
    Command::new(path)
        .args(arguments)
        .env("STORAGE_LOCK_POSTGRESQL_DSN", dsn)
        .output()
        .expect("run the example: `cargo test` builds it, `cargo test --test it` does not")
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A database of its own: the examples have table names of theirs.
fn with_database(test: impl FnOnce(&str)) {
    let name = format!("it_{}", Uuid::new_v4().simple());
    client().batch_execute(&format!("CREATE DATABASE {name}")).unwrap();
    let config: postgres::Config = dsn().parse().unwrap();
    let dsn = dsn().replace(&format!("dbname={}", config.get_dbname().unwrap()), &format!("dbname={name}"));
    test(&dsn);
    client().batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)")).unwrap();
}

#[test]
fn quickstart_lets_ten_workers_in_one_after_the_other() {
    with_database(|dsn| {
        let output = example("quickstart", &["20"], dsn);
        let text = text(&output);
        assert!(output.status.success(), "{text}");
        assert!(text.contains("log and resource agree: 10 workers"), "{text}");
        assert_eq!(text.matches("begin (version").count(), 10, "{text}");
    });
    let output = example("quickstart", &["soon"], &dsn());
    assert!(!output.status.success() && text(&output).contains("not a number of ms: \"soon\""), "{}", text(&output));
}

#[test]
fn detailed_config_holds_and_shows_its_lock() {
    with_database(|dsn| {
        let output = example("detailed_config", &[], dsn);
        let text = text(&output);
        assert!(output.status.success(), "{text}");
        assert!(text.contains("worker-1 holds must-serial-operation-resource-foo as version 1"), "{text}");
        assert!(text.contains("held now: must-serial-operation-resource-foo"), "{text}");
    });
}

#[test]
fn a_cron_job_does_its_job_or_says_who_does_and_is_content() {
    with_database(|dsn| {
        let done = example("cron_job", &[], dsn);
        assert!(done.status.success() && text(&done).contains("part 3 done"), "{}", text(&done));
        let _guard = StorageLock::connect("nightly-report", dsn).unwrap().lock("another host").unwrap();
        let busy = example("cron_job", &[], dsn);
        assert!(busy.status.success(), "{}", text(&busy));
        assert!(text(&busy).contains("another host has the lock: nothing to do"), "{}", text(&busy));
    });
}

#[test]
fn an_object_elsewhere_refuses_a_late_writer() {
    with_database(|dsn| {
        let output = example("object_store", &[], dsn);
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(
            text(&output),
            "worker-2: written as version 2\n\
             worker-1: version 1 is too old: 2 has been seen\n\
             worker-2: written as version 2\n\
             there is: Some(\"second report\")\n"
        );
    });
}

/// Each line as Prometheus reads it, and what the numbers have to be.
#[test]
fn events_become_metrics_in_the_text_format() {
    with_database(|dsn| {
        let output = example("prometheus", &[], dsn);
        assert!(output.status.success(), "{}", text(&output));
        let text = text(&output);
        let (mut types, mut values) = (HashMap::new(), HashMap::new());
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(types.insert(name, kind), None, "{name} has two types");
            } else if !line.starts_with("# HELP ") {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let name = series.split('{').next().unwrap();
                let is_typed = types.keys().any(|known| {
                    name == *known || ["_bucket", "_sum", "_count"].iter().any(|part| name == format!("{known}{part}"))
                });
                assert!(is_typed && name.starts_with("storage_lock_"), "{line}");
                assert_eq!(values.insert(series, value.parse::<f64>().unwrap()), None, "{series} comes twice");
            }
        }
        assert_eq!(types.len(), 9, "{types:?}");
        for (name, kind) in &types {
            let expected = match *name {
                "storage_lock_held" => "gauge",
                _ if name.ends_with("_seconds") => "histogram",
                _ if name.ends_with("_total") => "counter",
                _ => "a name for it",
            };
            assert_eq!(*kind, expected, "{name}");
        }
        for (series, value) in [
            ("storage_lock_acquires_total{takeover=\"false\"}", 10.0),
            ("storage_lock_acquires_total{takeover=\"true\"}", 0.0),
            ("storage_lock_acquire_wait_seconds_count", 10.0),
            ("storage_lock_acquire_wait_seconds_bucket{le=\"+Inf\"}", 10.0),
            ("storage_lock_releases_total{confirmed=\"true\"}", 9.0),
            ("storage_lock_releases_total{confirmed=\"false\"}", 0.0),
            ("storage_lock_losses_total", 0.0),
            ("storage_lock_held", 1.0),
            ("storage_lock_reconnects_total", 0.0),
        ] {
            assert_eq!(values.get(series), Some(&value), "{series} in {text}");
        }
        assert!(values["storage_lock_busy_total"] >= 1.0, "{text}");
        let (refreshes, took) =
            (values["storage_lock_refresh_seconds_count"], values["storage_lock_refresh_seconds_sum"]);
        assert!(refreshes >= 1.0 && took > 0.0 && took < refreshes * 2.0, "{text}");
        // The second and the third worker waited for others, which worked.
        assert!(values["storage_lock_acquire_wait_seconds_sum"] > 0.3, "{text}");
    });
}

#[test]
fn transfer_refuses_a_zombie_and_keeps_the_sum() {
    with_database(|dsn| {
        let output = example("transfer", &[], dsn);
        let text = text(&output);
        assert!(output.status.success(), "{text}");
        assert!(text.contains("zombie: has the lock as version 1"), "{text}");
        assert!(text.contains("as version 2"), "{text}");
        assert!(text.contains("zombie: refused: lost the lease on lock \"accounts\""), "{text}");
        assert!(text.contains("alice: 30") && text.contains("bob: 70"), "{text}");
    });
}

#[test]
fn an_error_is_told_with_its_whole_chain() {
    let output = example("cron_job", &[], &dsn().replace("password=", "password=wrong"));
    let text = text(&output);
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("cannot open a connection to PostgreSQL"), "{text}");
    assert!(text.contains("because: FATAL: password authentication failed"), "{text}");
    assert!(!text.contains("wrong"), "{text}");
    let unset = example("cron_job", &[], "");
    assert_eq!(unset.status.code(), Some(1));
}
