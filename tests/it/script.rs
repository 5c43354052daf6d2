//! `scripts/with-postgres.sh`: a server for a command, and nothing left behind.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::support::{eventually, takes_at_most};

fn script(command: &[&str]) -> Command {
    // Started in the background by a shell, or by nohup, these tests ignore a signal, and so would the script.
    let mut script = Command::new("env");
    script.args(["--default-signal=INT,HUP,TERM", concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/with-postgres.sh")]);
    script.args(command).env_remove("STORAGE_LOCK_POSTGRESQL_DSN").stdout(Stdio::piped()).stdin(Stdio::null());
    script
}

fn output(script: &mut Command) -> (i32, String) {
    let output = script.stderr(Stdio::inherit()).output().unwrap();
    (output.status.code().unwrap_or(-1), String::from_utf8(output.stdout).unwrap().trim().to_owned())
}

/// Starts the script with a command that says where its cluster is and then does nothing, and returns the folder.
fn start_sleeping(options: &[&str]) -> (Child, String) {
    use std::io::BufRead;
    let command = ["sh", "-c", "dirname \"$STORAGE_LOCK_POSTGRESQL_CTL\"; exec sleep 120"];
    let mut child = script(&[options, &command].concat()).process_group(0).spawn().unwrap();
    let mut folder = String::new();
    std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut folder).unwrap();
    assert!(Path::new(folder.trim()).join("server/data/postmaster.pid").exists(), "{folder}");
    (child, folder.trim().to_owned())
}

#[test]
fn it_passes_the_code_on_and_leaves_nothing_behind() {
    let say = "dirname \"$STORAGE_LOCK_POSTGRESQL_CTL\"; exit 7";
    for arguments in [vec!["sh", "-c", say], vec!["--fast", "sh", "-c", say]] {
        let (code, folder) =
            takes_at_most(Duration::from_secs(20), "a short command", || output(&mut script(&arguments)));
        assert_eq!(code, 7);
        assert!(folder.starts_with("/tmp/storage-lock-postgres."), "{folder}");
        assert!(!Path::new(&folder).exists(), "{folder} is left");
    }
}

#[test]
fn it_uses_the_server_that_is_there() {
    let command = "echo \"$STORAGE_LOCK_POSTGRESQL_DSN|${STORAGE_LOCK_POSTGRESQL_CTL-none}\"";
    let mut script = script(&["sh", "-c", command]);
    script.env("STORAGE_LOCK_POSTGRESQL_DSN", "host=there").env_remove("STORAGE_LOCK_POSTGRESQL_CTL");
    assert_eq!(output(&mut script), (0, "host=there|none".to_owned()));
}

#[test]
fn it_sets_what_it_is_told_whatever_the_characters() {
    use std::io::BufRead;
    let name = r#"it's a "name" \ with = and #"#;
    let mut script = script(&["--fast", "-c", &format!("cluster_name={name}"), "-c", "work_mem=5MB"]);
    script.args(["sh", "-c", "echo \"$STORAGE_LOCK_POSTGRESQL_DSN\"; exec cat"]).stdin(Stdio::piped());
    let mut child = script.spawn().unwrap();
    let mut dsn = String::new();
    std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut dsn).unwrap();
    let mut client = postgres::Client::connect(dsn.trim(), postgres::NoTls).unwrap();
    let row = client.query_one("SELECT current_setting('cluster_name'), current_setting('work_mem')", &[]).unwrap();
    assert_eq!((row.get(0), row.get(1)), (name, "5MB"));
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn it_takes_its_server_away_however_it_ends() {
    // To all processes of the group, as Ctrl-C at a terminal, or to the script alone.
    for (signal, goes_to_group) in [
        (Signal::SIGINT, true),
        (Signal::SIGTERM, false),
        (Signal::SIGHUP, false),
        (Signal::SIGKILL, false),
        (Signal::SIGKILL, true),
    ] {
        let (mut child, folder) = start_sleeping(&[]);
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        if goes_to_group {
            killpg(pid, signal).unwrap()
        } else {
            kill(pid, signal).unwrap()
        }
        let status = takes_at_most(Duration::from_secs(20), "the end", || child.wait().unwrap());
        assert!(!status.success());
        eventually("the cluster is gone", || !Path::new(&folder).exists());
        // What the killed script could not end.
        killpg(pid, Signal::SIGKILL).ok();
    }
}

fn postmaster(folder: &str, cluster: &str) -> Pid {
    let file = std::fs::read_to_string(Path::new(folder).join("server").join(cluster).join("postmaster.pid")).unwrap();
    Pid::from_raw(file.lines().next().unwrap().parse().unwrap())
}

#[test]
fn it_takes_a_server_away_that_was_stopped() {
    let (mut child, folder) = start_sleeping(&[]);
    let postmaster = postmaster(&folder, "data");
    kill(postmaster, Signal::SIGSTOP).unwrap();
    killpg(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGKILL).unwrap();
    child.wait().unwrap();
    eventually("the folder is gone", || !Path::new(&folder).exists());
    eventually("and so is the server", || kill(postmaster, None).is_err());
}

#[test]
fn it_takes_both_servers_of_a_pair_away() {
    for (standby, signal, stopped) in [
        ("sync", Signal::SIGTERM, None),
        ("async", Signal::SIGKILL, None),
        ("sync", Signal::SIGKILL, Some("data")),
        ("async", Signal::SIGKILL, Some("standby")),
    ] {
        let (mut child, folder) = start_sleeping(&["--standby", standby]);
        let postmasters = ["data", "standby"].map(|cluster| postmaster(&folder, cluster));
        if let Some(cluster) = stopped {
            kill(postmaster(&folder, cluster), Signal::SIGSTOP).unwrap();
        }
        killpg(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
        child.wait().unwrap();
        eventually("the folder is gone", || !Path::new(&folder).exists());
        eventually("and so are the servers", || postmasters.iter().all(|pid| kill(*pid, None).is_err()));
    }
}

#[test]
fn it_refuses_options_that_there_are_not() {
    for options in [["--standby", "both"], ["-c", "work_mem"]] {
        assert_eq!(output(script(&options).arg("true")).0, 2, "{options:?}");
    }
}

#[test]
fn two_at_once_do_not_meet() {
    let (mut one, one_folder) = start_sleeping(&[]);
    let (mut other, other_folder) = start_sleeping(&[]);
    assert_ne!(one_folder, other_folder);
    for child in [&mut one, &mut other] {
        kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGTERM).unwrap();
        child.wait().unwrap();
    }
    assert!(!Path::new(&one_folder).exists() && !Path::new(&other_folder).exists());
}

/// Killed at any moment, from its first on; but for the few milliseconds of SIGKILL before there is a watcher.
#[test]
fn it_leaves_nothing_behind_however_soon_it_ends() {
    let folders = || -> Vec<_> {
        let files = std::fs::read_dir("/tmp").unwrap().flatten().map(|file| file.path());
        files.filter(|path| path.to_string_lossy().contains("storage-lock-postgres.")).collect()
    };
    for round in 0..12_u64 {
        let before = folders();
        let mut child = script(&["--fast", "sleep", "60"]).process_group(0).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(round * 15));
        let signal = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP][usize::try_from(round).unwrap() % 3];
        // Before it has begun to listen to signals, it ends as anything does.
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        child.wait().unwrap();
        // Other tests start and end servers at the same time.
        let ours: Vec<_> = folders().into_iter().filter(|folder| !before.contains(folder)).collect();
        let owner = format!("/proc/{}", child.id());
        assert!(!Path::new(&owner).exists());
        for folder in ours {
            let is_anothers = || folder.join("server/data/postmaster.pid").exists() || folder.join("command").exists();
            eventually("it is gone, or another test's", || !folder.exists() || is_anothers());
        }
    }
}

#[test]
fn a_command_whose_script_was_killed_ends_with_its_server() {
    let (mut child, folder) = start_sleeping(&[]);
    let command: i32 = std::fs::read_to_string(Path::new(&folder).join("command")).unwrap().trim().parse().unwrap();
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL).unwrap();
    child.wait().unwrap();
    eventually("the command has ended", || kill(Pid::from_raw(command), None).is_err());
    eventually("nothing is left", || !Path::new(&folder).exists());
}

/// What a caller has set for servers of its own has no say in ours.
#[test]
fn settings_for_other_servers_are_not_for_this_one() {
    let mut script = script(&["--fast", "--standby", "async", "sh", "-c", "echo \"$STORAGE_LOCK_POSTGRESQL_DSN\""]);
    script.envs([("PGSSLMODE", "verify-full"), ("PGHOST", "nowhere.invalid"), ("PGPORT", "1"), ("PGDATA", "/nowhere")]);
    let (code, dsn) = output(&mut script);
    assert_eq!(code, 0);
    assert!(dsn.contains("target_session_attrs=read-write"), "{dsn}");
}

/// A shell with CDPATH goes elsewhere with `cd scripts/..`.
#[test]
fn scripts_find_their_own_folder_whatever_cdpath_is() {
    let trap = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("cdpath");
    std::fs::create_dir_all(trap.join("scripts")).unwrap();
    let mut check = Command::new("scripts/planted-bugs.sh");
    check.arg("--check").current_dir(env!("CARGO_MANIFEST_DIR")).env("CDPATH", &trap).stdout(Stdio::null());
    assert!(check.status().unwrap().success());
    assert_eq!(std::fs::read_dir(&trap).unwrap().count(), 1, "something was made there");
}
