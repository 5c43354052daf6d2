//! The repository itself.

use std::fs;
use std::path::{Path, PathBuf};

fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap().flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
            } else if entry.file_name().to_string_lossy().ends_with(ending) {
                found.push(entry.path());
            }
        }
    }
    found
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

#[test]
fn a_test_that_the_docs_name_exists() {
    let tests: String = [files("tests", ".rs"), files("src", ".rs")].concat().iter().map(read).collect();
    let mut named = 0;
    for document in ["README.md", "src/lib.rs", "src/guarantees.rs"] {
        // A line may end between the two words; and there are commands that end in `test`.
        let text = read(document).replace("\n//!", "\n").replace("\n ", "\n").replace('\n', " ");
        let names = text.split("test `").skip(1).filter_map(|rest| rest.split('`').next());
        for name in names.filter(|name| !name.is_empty()) {
            assert!(tests.contains(&format!("fn {name}()")), "{document} names a test that isn't there: {name}");
            named += 1;
        }
    }
    assert!(named > 10, "only {named} tests are named");
}

#[test]
fn every_planted_bug_stands_in_the_table_of_its_folder() {
    const FOLDER: &str = "tests/robustness/planted";
    let table = read(format!("{FOLDER}/README.md"));
    let mut planted: Vec<String> = files(FOLDER, ".patch")
        .iter()
        .filter_map(|path| Some(path.file_stem()?.to_string_lossy().into_owned()))
        .collect();
    planted.sort();
    let mut named: Vec<&str> = table.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    named.sort_unstable();
    assert_eq!(planted, named);
    assert!(planted.len() >= 12);
}

#[test]
fn the_readme_shows_the_table_that_is_created() {
    let table = crate::support::Table::new();
    let ddl = table.storage().table_ddl().replace(&table.name, "storage_lock");
    assert!(read("README.md").contains(&ddl), "the README should show:\n{ddl}");
}

#[test]
fn nothing_is_left_unfinished() {
    for file in [files("src", ".rs"), files("examples", ".rs")].concat() {
        let text = read(&file);
        for word in ["todo!(", "unimplemented!(", "FIXME", "XXX", "dbg!(", "#[ignore"] {
            assert!(!text.contains(word), "{word} in {}", file.display());
        }
    }
}

/// The rooms of the library, each of which uses only those below it.
const ROOMS: [&str; 16] = [
    "lib",
    "fuzz",
    "guarantees",
    "lock",
    "fence",
    "guard",
    "storage",
    "wait",
    "options",
    "hold",
    "db",
    "events",
    "error",
    "user_code",
    "backoff",
    "sync",
];

#[test]
fn the_rooms_use_only_those_below_them() {
    for file in files("src", ".rs") {
        let path = file.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
        let path = path.with_extension("").to_string_lossy().into_owned();
        let room = path.split('/').next().unwrap();
        // What belongs to tests, and what is inside of a `mod tests`, may look into all of them.
        if room == "model" || path.contains("/tests") {
            continue;
        }
        let place = |room: &str| ROOMS.iter().position(|known| *known == room);
        let own = place(room).unwrap_or_else(|| panic!("{room} is not among the rooms"));
        let text = read(&file);
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        let code: String = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        let used = code
            .split("crate::")
            .skip(1)
            .filter_map(|rest| rest.split(|c: char| !(c.is_alphanumeric() || c == '_')).next());
        for other in used.filter(|other| *other != room && *other != "model") {
            // A type at the crate's root is nobody's.
            let Some(other_place) = place(other) else { continue };
            assert!(own < other_place, "src/{path}.rs uses {other}, which is above it");
        }
    }
}

#[test]
fn files_and_lines_are_short_enough_to_read() {
    for file in ["src", "tests", "benches", "examples"].iter().flat_map(|folder| files(folder, ".rs")) {
        let text = read(&file);
        for (number, line) in (1..).zip(text.lines()) {
            assert!(line.chars().count() <= 120, "{}:{number} has {} columns", file.display(), line.chars().count());
        }
    }
    for file in files("src", ".rs") {
        let path = file.to_string_lossy().into_owned();
        let text = read(&file);
        let code = text.split("mod tests {").next().unwrap().lines().count();
        let is_code = !["/tests", "/model/", "guarantees"].iter().any(|part| path.contains(part));
        assert!(!is_code || code <= 420, "{path} has {code} lines");
    }
}

/// A clock that can be set has no say in anything.
#[test]
fn this_machines_wall_clock_is_never_asked() {
    for file in files("src", ".rs") {
        assert!(!read(&file).contains("SystemTime::now"), "{}", file.display());
    }
}

#[test]
fn the_library_depends_on_what_it_says_and_nothing_more() {
    let manifest = read("Cargo.toml");
    let dependencies = manifest.split("[dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    let (optional, needed): (Vec<&str>, Vec<&str>) =
        dependencies.lines().filter(|line| !line.is_empty()).partition(|line| line.contains("optional = true"));
    assert!(optional.iter().all(|line| line.contains("openssl")), "{optional:?}");
    let mut names: Vec<&str> = needed.iter().filter_map(|line| line.split(" =").next()).collect();
    names.sort_unstable();
    assert_eq!(names, ["log", "postgres", "r2d2", "r2d2_postgres", "thiserror", "uuid"]);
}
