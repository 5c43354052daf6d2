//! Many runs, each from a seed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::hurt::{KINDS, Plan};
use crate::processes::wall_clock;
use crate::run::{FAULTS, Report, TIMES, WORKERS, one_at_a_time, run};
use crate::support::server::Server;
use crate::verdict::Counts;
use crate::workload::uses_tls;

/// How many seeds run where nobody says otherwise.
const SEEDS: u64 = 20;
/// After so many broken runs it is known that something is broken.
const ENOUGH: u64 = 5;

/// A number from the environment; `scripts/robustness.sh` sets them.
fn number(name: &str) -> Option<u64> {
    let value = std::env::var(format!("STORAGE_LOCK_ROBUSTNESS_{name}")).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("STORAGE_LOCK_ROBUSTNESS_{name}={value}: expected a number")))
}

#[test]
fn whatever_is_hurt_the_verdict_holds() {
    let _alone = one_at_a_time();
    if wall_clock().is_none() {
        println!("libfaketime is not installed: nobody's wall clock is moved");
    }
    let (first, minutes) = (number("SEED").unwrap_or(1), number("MINUTES"));
    let seeds = number("SEEDS").unwrap_or(if minutes.is_some() { u64::MAX } else { SEEDS });
    let enough = number("ENOUGH").unwrap_or(ENOUGH);
    let minutes = minutes.map(|minutes| Duration::from_secs(60 * minutes));
    // Several runs may be ending at once.
    let mut options = vec!["-c", "max_connections=160"];
    if uses_tls() {
        options.push("--tls");
    }
    let server = Arc::new(Mutex::new(Server::start_with(&options)));
    let (start, mut counts, mut used) = (Instant::now(), Counts::default(), BTreeSet::new());
    let (mut judged, mut broken) = (0, Vec::new());
    let mut see = |report: Report| {
        print!("{}", report.text);
        counts += report.counts;
        used.extend(report.used);
        judged += 1;
        if !report.violations.is_empty() {
            broken.push(report.seed);
        }
        broken.len() as u64
    };
    // One run may still be ending while the next one goes on.
    let mut ending: Vec<JoinHandle<Report>> = Vec::new();
    for seed in (first..first.saturating_add(seeds)).take_while(|_| minutes.is_none_or(|most| start.elapsed() < most)) {
        ending.push(run(seed, &server));
        let mut found = 0;
        while let Some(over) = ending.iter().position(JoinHandle::is_finished) {
            found = see(ending.swap_remove(over).join().expect("a report"));
        }
        if found >= enough {
            break;
        }
    }
    for report in ending {
        see(report.join().expect("a report"));
    }
    println!("{judged} runs in {:?}: {counts}", start.elapsed());
    println!("hurts: {}", used.iter().copied().collect::<Vec<_>>().join(", "));
    assert!(broken.is_empty(), "broken in the runs of seeds {broken:?}; scripts/robustness.sh --seed N runs one again");
    assert!(counts.holds > 0, "nothing happened");
    if first == 1 && judged >= SEEDS {
        assert!(2 * used.len() > KINDS.len(), "hurt by little: {used:?}");
        assert!(counts.takeovers > 0 && counts.lost > 0 && counts.kills > 0, "the faults did nothing: {counts}");
        assert!(counts.refused_late > 0, "the fences had nothing to do: {counts}");
    }
}

/// A run has some of them; sixty, as of a planted bug, have each several times.
#[test]
fn sixty_seeds_draw_each_hurt_again_and_again() {
    let mut drawn: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in 1..=60 {
        let plan = Plan::draw(seed, WORKERS, FAULTS, TIMES.lease);
        let names: BTreeSet<&str> = plan.hurts().collect();
        names.into_iter().for_each(|name| *drawn.entry(name).or_default() += 1);
    }
    for kind in KINDS {
        assert!(drawn.get(kind).is_some_and(|seeds| *seeds >= 3), "{kind}: {drawn:?}");
    }
}
