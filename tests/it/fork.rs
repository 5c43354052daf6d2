//! A process that forks after it has opened a storage.

use std::process;
use std::time::Duration;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{self, ForkResult};
use storage_lock::Error;

use crate::support::child::{Process, say};
use crate::support::{Table, is_refreshed, ms, short_lock, takes_at_most};

#[test]
fn in_a_fork_the_old_storage_fails_at_once_and_a_new_one_works() {
    let table = Table::new();
    table.storage();
    let mut child = Process::start("fork", &table, &[]);
    assert_eq!(child.next_line(Duration::from_secs(60)).as_deref(), Some("ended Exited 0"));
    assert_eq!(child.expect_line(), "held");
    assert!(child.wait().success());
}

pub fn fork(table: &Table) {
    let storage = table.storage();
    let lock = short_lock(&storage, "l", ms(3_000), ms(300));
    let guard = lock.lock("parent").unwrap();
    is_refreshed(&guard);
    // SAFETY: the child does what a program might that forks with other threads running, which is what this is about.
    #[allow(unsafe_code)]
    match unsafe { unistd::fork() }.unwrap() {
        ForkResult::Child => {
            let code = i32::from(
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| in_the_fork(table, lock, guard))).is_err(),
            );
            process::exit(code);
        }
        ForkResult::Parent { child } => {
            let ended = match waitpid(child, None).unwrap() {
                WaitStatus::Exited(_, code) => format!("Exited {code}"),
                other => format!("{other:?}"),
            };
            say(format!("ended {ended}"));
            is_refreshed(&guard);
            say(if guard.is_held() { "held" } else { "lost" });
            guard.unlock().unwrap();
        }
    }
}

fn in_the_fork(table: &Table, lock: storage_lock::StorageLock, guard: storage_lock::LockGuard) {
    takes_at_most(ms(200), "everything", || {
        assert!(matches!(lock.try_lock("child"), Err(Error::Forked)));
        assert!(matches!(lock.lock("parent"), Err(Error::Forked)), "not even again, on the same thread");
        assert!(matches!(lock.info(), Err(Error::Forked)));
        assert!(!guard.is_held() && guard.remaining().is_zero());
        assert!(matches!(guard.unlock(), Err(Error::Forked)));
        drop(lock);
    });
    let own = table.storage();
    assert!(own.get("l").unwrap().unwrap().is_held, "by the parent");
    let lock = storage_lock::StorageLock::new(&own, "another").unwrap();
    drop(lock.lock("child").unwrap());
}
