use super::*;

/// A folder with what a round left, whose adapter is this text.
fn made(dir: &Path, text: &str) -> PathBuf {
    let run = dir.join(format!("run-{text}"));
    fs::create_dir_all(run.join("checkpoints/step-3")).unwrap();
    fs::write(run.join("checkpoints/step-3/adapter_model.safetensors"), text).unwrap();
    fs::write(run.join(".lock"), "held").unwrap();
    for name in ["adapter_model.safetensors", ADAPTER_CONFIG, "metrics.jsonl"] {
        fs::write(run.join(name), text).unwrap();
    }
    run
}

fn record(version: u64, parent: Option<u64>) -> Version {
    let file = TakenFile { name: format!("{version}.jsonl"), sha256: format!("{version:064}"), bytes: version };
    let (eval_loss_before, eval_loss) = (Some(2.0), Some(2.0 - version as f64 / 8.0));
    Version {
        version,
        parent,
        files: vec![file],
        steps: 3,
        eval_loss_before,
        eval_loss,
        rejected: None,
        finished_at: 5,
    }
}

fn read_current(dir: &Path) -> String {
    fs::read_to_string(dir.join(CURRENT_LINK).join("adapter_model.safetensors")).unwrap()
}

fn three(dir: &Path) -> Versions {
    let versions = Versions::new(dir);
    for (version, parent, text) in [(1, None, "one"), (2, Some(1), "two"), (4, Some(2), "four")] {
        assert!(versions.publish(&made(dir, text), &record(version, parent)).unwrap());
    }
    versions
}

#[test]
fn versions_are_kept_and_the_link_is_the_newest() {
    let dir = tempfile::tempdir().unwrap();
    let versions = Versions::new(dir.path());
    assert_eq!((versions.current().unwrap(), versions.list().unwrap()), (None, vec![]));
    let versions = three(dir.path());
    let bad = Version { rejected: Some("worse".into()), eval_loss: None, ..record(3, Some(2)) };
    versions.keep(&made(dir.path(), "three"), &bad).unwrap();
    assert_eq!(read_current(dir.path()), "four");
    assert_eq!(fs::read_link(dir.path().join(CURRENT_LINK)).unwrap(), Path::new("versions/0004"), "it may be moved");
    let all: Vec<_> = versions.list().unwrap();
    assert_eq!(all, [record(1, None), record(2, Some(1)), bad, record(4, Some(2))]);
    let line: Vec<u64> = versions.lineage(Some(4)).unwrap().iter().map(|version| version.version).collect();
    assert_eq!(line, [4, 2, 1]);
    let mut names: Vec<_> = fs::read_dir(versions.folder(1)).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, [ADAPTER_CONFIG, "adapter_model.safetensors", "metrics.jsonl", VERSION_FILE]);
    // A version that was removed ends the line.
    fs::remove_dir_all(versions.folder(2)).unwrap();
    assert_eq!(versions.lineage(Some(4)).unwrap().len(), 1);
}

#[test]
fn going_back_changes_the_link_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let versions = three(dir.path());
    assert_eq!(versions.rollback(None).unwrap(), (Some(4), 2));
    assert_eq!(read_current(dir.path()), "two");
    assert_eq!(versions.rollback(Some(4)).unwrap(), (Some(2), 4), "and forth");
    assert_eq!(versions.rollback(Some(1)).unwrap(), (Some(4), 1));
    for (to, words) in [(None, "before 0001"), (Some(3), "0003")] {
        let e = versions.rollback(to).unwrap_err();
        assert!(e.is_usage() && e.to_string().contains(words) && e.to_string().contains("[1, 2, 4]"), "{e}");
    }
    assert_eq!((read_current(dir.path()).as_str(), versions.list().unwrap().len()), ("one", 3));
    let empty = tempfile::tempdir().unwrap();
    assert!(Versions::new(empty.path()).rollback(None).unwrap_err().to_string().contains("--watch"));
    assert_eq!(fs::read_dir(empty.path()).unwrap().count(), 0, "nothing was made there");
}

#[test]
fn a_round_is_not_published_over_a_version_that_was_gone_back_to() {
    let dir = tempfile::tempdir().unwrap();
    let versions = three(dir.path());
    versions.rollback(Some(1)).unwrap();
    assert!(!versions.publish(&made(dir.path(), "five"), &record(5, Some(4))).unwrap());
    assert_eq!((read_current(dir.path()).as_str(), versions.folder(5).exists()), ("one", false));
    assert!(versions.publish(&made(dir.path(), "five"), &record(5, Some(1))).unwrap());
    assert_eq!(read_current(dir.path()), "five");
}

#[test]
fn what_a_kill_left_half_done_is_finished_by_the_next_call() {
    let dir = tempfile::tempdir().unwrap();
    let versions = three(dir.path());
    let run = made(dir.path(), "five");
    // Killed while the folder was filled, and while the link was made.
    fs::create_dir_all(dir.path().join("versions/.tmp-half")).unwrap();
    symlink("versions/0009", dir.path().join(NEW_LINK)).unwrap();
    assert_eq!(versions.list().unwrap().len(), 3);
    // Killed between the folder and the link.
    versions.keep(&run, &record(5, Some(4))).unwrap();
    assert_eq!(read_current(dir.path()), "four");
    for _ in 0..2 {
        assert!(versions.publish(&run, &record(5, Some(4))).unwrap());
        assert_eq!(read_current(dir.path()), "five");
    }
    assert!(fs::symlink_metadata(dir.path().join(NEW_LINK)).is_err());
}

#[test]
fn what_is_not_ours_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(CURRENT_LINK), "a file").unwrap();
    let versions = Versions::new(dir.path());
    assert!(matches!(versions.current(), Err(Error::CurrentLink { .. })));
    fs::remove_file(dir.path().join(CURRENT_LINK)).unwrap();
    for elsewhere in ["elsewhere", "versions/latest", "versions/1"] {
        symlink(elsewhere, dir.path().join(CURRENT_LINK)).unwrap();
        assert!(matches!(versions.current(), Err(Error::CurrentLink { .. })), "{elsewhere}");
        fs::remove_file(dir.path().join(CURRENT_LINK)).unwrap();
    }
    let versions = three(dir.path());
    fs::write(versions.folder(2).join(VERSION_FILE), "{\"version\": 2").unwrap();
    let e = versions.list().unwrap_err();
    assert!(e.is_usage() && e.to_string().contains("0002/version.json"), "{e}");
}
