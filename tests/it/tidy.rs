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
    let mut names: Vec<&str> =
        dependencies.lines().filter_map(|line| line.split(" =").next()).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    assert_eq!(names, ["log", "postgres", "r2d2", "r2d2_postgres", "thiserror", "uuid"]);
}
