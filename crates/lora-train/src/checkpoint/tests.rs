use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

fn identity() -> RunIdentity {
    RunIdentity {
        config: [
            ("lora.r".into(), "8".into()),
            ("train.save_steps".into(), "5".into()),
            ("output_dir".into(), "\"a\"".into()),
        ]
        .into(),
        digests: [("base".into(), "ab".into()), ("data".into(), "cd".into())].into(),
        libtorch: "2.11.0".into(),
        device: "cpu".into(),
        world_size: 1,
        threads: 2,
    }
}

fn state(step: u64) -> TrainState {
    TrainState {
        step,
        cursor_row: step / 3,
        seconds: 0.1 + step as f64,
        best_eval: Some(1.0 / 3.0),
        evals_since_best: 2,
        ..Default::default()
    }
}

/// Two files whose contents depend on the step.
fn save(run: &Path, step: u64) -> Result<PathBuf> {
    save_checkpoint(run, &identity(), &state(step), 1000, 2, |dir| {
        fs::write(dir.join("adapter_model.safetensors"), step.to_le_bytes().repeat(9)).unwrap();
        fs::write(dir.join("optimizer.safetensors"), format!("moments of {step}")).unwrap();
        Ok(())
    })
}

fn run_with(steps: &[u64]) -> tempfile::TempDir {
    let run = tempfile::tempdir().unwrap();
    for step in steps {
        save(run.path(), *step).unwrap();
    }
    run
}

fn here(run: &tempfile::TempDir) -> Vec<String> {
    let mut names = names(&run.path().join(CHECKPOINTS_DIR)).unwrap();
    names.sort();
    names
}

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    names(dir).unwrap().into_iter().map(|n| (n.clone(), fs::read(dir.join(&n)).unwrap())).collect()
}

/// What must hold when the checkpoint of step 10 is damaged and that of step 5 is not.
fn falls_back(run: &tempfile::TempDir, what: &str) -> String {
    let older = contents(&run.path().join("checkpoints/step-5"));
    let found = find_checkpoint(run.path()).unwrap().unwrap();
    assert_eq!(found.manifest.step, 5, "{what}");
    let [(moved_to, reason)] = found.quarantined.as_slice() else { panic!("{what}: {found:?}") };
    assert!(moved_to.ends_with("quarantine-step-10") && moved_to.exists(), "{what}: {moved_to:?}");
    let noted = fs::read_to_string(moved_to.with_file_name("quarantine-step-10.reason.txt")).unwrap();
    assert_eq!(noted.trim(), reason);
    assert_eq!(contents(&found.dir), older, "{what}: the older one must stay as it is");
    reason.clone()
}

#[test]
fn what_was_saved_is_found_again() {
    let run = run_with(&[5]);
    let found = find_checkpoint(run.path()).unwrap().unwrap();
    assert_eq!((found.manifest.state, found.manifest.run), (state(5), identity()));
    assert_eq!(found.manifest.files["optimizer.safetensors"].bytes, 12);
    assert_eq!(fs::read(found.dir.join("optimizer.safetensors")).unwrap(), b"moments of 5");
    assert!(found.quarantined.is_empty());
    assert!(find_checkpoint(tempfile::tempdir().unwrap().path()).unwrap().is_none());
}

#[test]
fn the_newest_by_step_counts_and_the_rest_goes() {
    let run = run_with(&[5, 90, 100]);
    assert_eq!(here(&run), ["step-100", "step-90"]);
    let old = run.path().join("checkpoints/step-90");
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(9999);
    File::open(old.join("manifest.json")).unwrap().set_modified(later).unwrap();
    File::open(&old).unwrap().set_modified(later).unwrap();
    assert_eq!(find_checkpoint(run.path()).unwrap().unwrap().manifest.step, 100);
    // Names that are not ours are left alone.
    for name in ["step-7x", "step-07", "step-", "notes"] {
        fs::create_dir(run.path().join("checkpoints").join(name)).unwrap();
    }
    save(run.path(), 110).unwrap();
    assert_eq!(here(&run), ["notes", "step-", "step-07", "step-100", "step-110", "step-7x"]);
}

#[test]
fn every_truncation_is_detected() {
    for file in ["adapter_model.safetensors", "optimizer.safetensors", MANIFEST_FILE] {
        let whole = fs::read(run_with(&[5, 10]).path().join("checkpoints/step-10").join(file)).unwrap().len();
        for left in [0, 1, whole / 2, whole - 1] {
            let run = run_with(&[5, 10]);
            let path = run.path().join("checkpoints/step-10").join(file);
            File::options().write(true).open(&path).unwrap().set_len(left as u64).unwrap();
            let reason = falls_back(&run, &format!("{file} cut to {left}"));
            assert!(reason.contains(file), "{reason}");
        }
    }
}

/// Every bit of every file, the manifest's own included.
#[test]
fn every_bit_flip_is_detected() {
    let run = run_with(&[5, 10]);
    let dir = run.path().join("checkpoints/step-10");
    let mut flips = 0;
    for (name, whole) in contents(&dir) {
        let file = File::options().write(true).open(dir.join(&name)).unwrap();
        for bit in 0..whole.len() * 8 {
            let (at, byte) = (bit / 8, whole[bit / 8]);
            file.write_all_at(&[byte ^ (1 << (bit % 8))], at as u64).unwrap();
            match verify_checkpoint(&dir) {
                Err(Error::CheckpointDamaged { damage, .. }) => {
                    assert!(damage.to_string().contains(&name), "{name} bit {bit}: {damage}");
                }
                // The version's digit may become a larger one, and a newer format is refused before all else.
                Err(Error::CheckpointTooNew { .. }) => assert_eq!(name, MANIFEST_FILE),
                other => panic!("{name} bit {bit}: {other:?}"),
            }
            file.write_all_at(&[byte], at as u64).unwrap();
            flips += 1;
        }
    }
    assert!(flips > 5000, "{flips}");
    assert_eq!(verify_checkpoint(&dir).unwrap().step, 10);
}

#[test]
fn a_missing_added_or_swapped_file_is_detected() {
    for file in ["adapter_model.safetensors", "optimizer.safetensors", MANIFEST_FILE] {
        let run = run_with(&[5, 10]);
        fs::remove_file(run.path().join("checkpoints/step-10").join(file)).unwrap();
        assert_eq!(falls_back(&run, file), format!("{file} is missing"));

        let run = run_with(&[5, 10]);
        let [new, old] = ["step-10", "step-5"].map(|dir| run.path().join("checkpoints").join(dir).join(file));
        fs::copy(&old, &new).unwrap();
        falls_back(&run, &format!("{file} of the other checkpoint"));
    }
    let run = run_with(&[5, 10]);
    fs::write(run.path().join("checkpoints/step-10/more"), b"").unwrap();
    assert_eq!(falls_back(&run, "one more file"), "more does not belong to it");

    let run = run_with(&[5, 10]);
    let path = run.path().join("checkpoints/step-10/optimizer.safetensors");
    let aside = run.path().join("aside");
    fs::rename(&path, &aside).unwrap();
    std::os::unix::fs::symlink(&aside, &path).unwrap();
    assert_eq!(falls_back(&run, "a link to the very file"), "optimizer.safetensors is not a plain file");

    let run = run_with(&[5, 10]);
    fs::create_dir(run.path().join("checkpoints/step-10/more")).unwrap();
    assert_eq!(falls_back(&run, "a folder"), "more is not a plain file");
}

#[test]
fn a_checkpoint_under_another_step_is_detected() {
    let run = run_with(&[5]);
    let checkpoints = run.path().join(CHECKPOINTS_DIR);
    let copy = checkpoints.join("step-10");
    fs::create_dir(&copy).unwrap();
    for (name, bytes) in contents(&checkpoints.join("step-5")) {
        fs::write(copy.join(name), bytes).unwrap();
    }
    assert_eq!(falls_back(&run, "a copy"), "manifest.json is of step 5, and the folder of step 10");

    let run = run_with(&[5]);
    fs::write(run.path().join("checkpoints/step-10"), b"").unwrap();
    assert_eq!(falls_back(&run, "a file"), "it is not a folder");
}

#[test]
fn with_none_left_the_run_stops_now_and_at_every_later_start() {
    let run = run_with(&[5, 10]);
    for step in [5, 10] {
        fs::write(run.path().join(format!("checkpoints/step-{step}/optimizer.safetensors")), b"moments of x").unwrap();
    }
    for _ in 0..2 {
        let e = find_checkpoint(run.path()).unwrap_err();
        let Error::NoGoodCheckpoint { reasons, .. } = &e else { panic!("{e}") };
        assert_eq!(reasons.len(), 2);
        let text = e.to_string();
        assert!(text.contains("step-5: optimizer") && text.contains("step-10: optimizer"), "{text}");
    }
    assert_eq!(here(&run).len(), 4, "two folders in quarantine and two reasons: {:?}", here(&run));
}

#[test]
fn a_newer_format_is_refused_and_left_alone() {
    for edited in ["\"format_version\": 2", "\"format_version\": 999"] {
        let run = run_with(&[5, 10]);
        let path = run.path().join("checkpoints/step-10/manifest.json");
        let text = fs::read_to_string(&path).unwrap().replace("\"format_version\": 1", edited);
        fs::write(&path, &text).unwrap();
        let e = find_checkpoint(run.path()).unwrap_err();
        assert!(matches!(e, Error::CheckpointTooNew { found: 2 | 999, supported: 1, .. }), "{e}");
        assert_eq!((here(&run), fs::read_to_string(&path).unwrap()), (vec!["step-10".into(), "step-5".into()], text));
    }
}

#[test]
fn a_failed_save_leaves_no_trace_and_touches_no_older_one() {
    let run = run_with(&[5, 10]);
    let before = ["step-5", "step-10"].map(|dir| contents(&run.path().join("checkpoints").join(dir)));
    let failing = |write: &dyn Fn(&Path) -> Result<()>| {
        save_checkpoint(run.path(), &identity(), &state(15), 0, 2, write).unwrap_err().to_string()
    };
    let half_written = failing(&|dir| {
        fs::write(dir.join("adapter_model.safetensors"), b"half").unwrap();
        fs::copy(dir.join("adapter_model.safetensors"), "/dev/full").map(drop).map_err(Error::io("write", "/dev/full"))
    });
    assert!(half_written.contains("/dev/full") && half_written.contains("os error 28"), "{half_written}");
    let folder = failing(&|dir| fs::create_dir(dir.join("inner")).map_err(Error::io("create", dir)));
    assert!(folder.contains("inner: must be a plain file"), "{folder}");
    let reserved = failing(&|dir| fs::write(dir.join("manifest.json"), "").map_err(Error::io("write", dir)));
    assert!(reserved.contains("manifest.json: must be a plain file"), "{reserved}");
    let no_space =
        save_checkpoint(run.path(), &identity(), &state(15), u64::MAX / 2, 2, |_| panic!("must not be called"));
    assert!(matches!(no_space, Err(Error::NoSpace { .. })), "{no_space:?}");
    assert_eq!(here(&run), ["step-10", "step-5"]);
    assert_eq!(before, ["step-5", "step-10"].map(|dir| contents(&run.path().join("checkpoints").join(dir))));
}

#[test]
fn what_a_killed_run_left_goes_and_never_counts() {
    let run = run_with(&[5]);
    let half = run.path().join("checkpoints/.tmp-step-10-abc");
    let make_half = || {
        fs::create_dir(&half).unwrap();
        for (name, bytes) in contents(&run.path().join("checkpoints/step-5")) {
            fs::write(half.join(name), bytes).unwrap();
        }
    };
    make_half();
    assert_eq!(find_checkpoint(run.path()).unwrap().unwrap().manifest.step, 5);
    assert_eq!(here(&run), ["step-5"]);
    make_half();
    save(run.path(), 10).unwrap();
    assert_eq!(here(&run), ["step-10", "step-5"]);
}

#[test]
fn the_same_step_again() {
    let run = run_with(&[5, 10]);
    let dir = run.path().join("checkpoints/step-10");
    let before = contents(&dir);
    assert_eq!(save(run.path(), 10).unwrap(), dir);
    assert_eq!(contents(&dir), before);
    let other = save_checkpoint(run.path(), &identity(), &state(10), 0, 2, |_| Ok(()));
    assert!(matches!(other, Err(Error::CheckpointExists { .. })), "{other:?}");
    assert_eq!((contents(&dir), here(&run)), (before.clone(), vec!["step-10".into(), "step-5".into()]));
    fs::remove_file(dir.join("optimizer.safetensors")).unwrap();
    save(run.path(), 10).unwrap();
    assert_eq!(contents(&dir), before);
    assert_eq!(here(&run), ["quarantine-step-10", "quarantine-step-10.reason.txt", "step-10", "step-5"]);
}

#[test]
fn a_resume_lists_every_field_that_differs() {
    let old = identity();
    assert_eq!(compare_for_resume(&old, &old, &[]).unwrap(), []);
    let mut moved = old.clone();
    moved.config.insert("output_dir".into(), "\"b\"".into());
    assert_eq!(compare_for_resume(&old, &moved, &[]).unwrap(), []);

    let mut new = old.clone();
    new.config.insert("lora.r".into(), "16".into());
    new.config.insert("train.save_steps".into(), "7".into());
    new.config.insert("train.new_key".into(), "1".into());
    new.digests.insert("data".into(), "ef".into());
    new.digests.remove("base");
    (new.libtorch, new.device, new.threads) = ("2.12.0".into(), "cuda:0".into(), 1);
    let e = compare_for_resume(&old, &new, &[]).unwrap_err();
    assert!(e.is_usage());
    for part in [
        "lora.r was 8 and is 16",
        "train.save_steps* was 5 and is 7",
        "train.new_key was nothing and is 1",
        "the sha256 of the data was cd and is ef",
        "the sha256 of the base was ab and is nothing",
        "libtorch was 2.11.0 and is 2.12.0",
        "device was cpu and is cuda:0",
        "threads was 2 and is 1",
    ] {
        assert!(e.to_string().contains(part), "{part}: {e}");
    }
    // What the user asks for is taken only where it is harmless.
    let asked = ["train.save_steps".to_string(), "lora.r".to_string()];
    let Err(Error::ResumeMismatch { differences }) = compare_for_resume(&old, &new, &asked) else { panic!() };
    assert!(
        differences.iter().all(|d| d.field != "train.save_steps") && differences.iter().any(|d| d.field == "lora.r")
    );
    let mut longer = old.clone();
    longer.config.insert("train.save_steps".into(), "7".into());
    longer.config.insert("train.max_steps".into(), "9".into());
    let asked = ["train.save_steps".to_string(), "train.max_steps".to_string()];
    assert_eq!(compare_for_resume(&old, &longer, &asked).unwrap().len(), 2);
    assert!(compare_for_resume(&old, &longer, &[]).is_err());
    // Data that is only evaluated on is another one when that was asked for.
    let mut judged = old.clone();
    judged.config.insert("data.eval".into(), "\"b.jsonl\"".into());
    judged.digests.insert("eval data".into(), "01".into());
    assert_eq!(compare_for_resume(&old, &judged, &["data.eval".to_string()]).unwrap().len(), 2);
    let text = compare_for_resume(&old, &judged, &[]).unwrap_err().to_string();
    assert!(text.contains("the sha256 of the eval data* was nothing and is 01"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_manifest_reads_back_equal(
        (step, rows, tokens) in (any::<u64>(), any::<u64>(), any::<u64>()),
        seconds in 0f64..1e9,
        best_eval in proptest::option::of(-1e3f64..1e3),
        texts in proptest::collection::btree_map(".{0,12}", ".{0,12}", 0..6),
        files in proptest::collection::btree_map("[^/\0]{1,12}", (any::<u64>(), "[0-9a-f]{64}"), 0..6),
    ) {
        let manifest = Manifest {
            format_version: FORMAT_VERSION,
            step,
            run: RunIdentity { config: texts.clone(), digests: texts, libtorch: "\",\n  \"sha256\": \"".into(), ..identity() },
            state: TrainState { cursor_row: rows, tokens, seconds, best_eval, ..state(step) },
            files: files.into_iter().map(|(name, (bytes, sha256))| (name, FileEntry { bytes, sha256 })).collect(),
        };
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(MANIFEST_FILE), manifest.to_text().unwrap()).unwrap();
        prop_assert_eq!(Manifest::read(dir.path()).unwrap(), manifest);
    }

}

proptest! {
    // Every save syncs ten times.
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Saves, damage to any one file, and kills in any order: what is found is always whole, and always the newest that is.
    #[test]
    fn any_history_leaves_the_newest_whole_one(
        history in proptest::collection::vec((0usize..3, any::<proptest::sample::Index>()), 1..12),
    ) {
        let run = tempfile::tempdir().unwrap();
        let (mut step, mut whole) = (0, Vec::new());
        for (action, which) in history {
            match action {
                0 => {
                    step += 5;
                    save(run.path(), step).unwrap();
                    whole.push(step);
                    let kept: Vec<u64> = list(&run.path().join(CHECKPOINTS_DIR)).unwrap().iter().map(|(s, _)| *s).collect();
                    whole.retain(|s| kept.contains(s));
                }
                1 if !whole.is_empty() => {
                    let victim = whole.remove(which.index(whole.len()));
                    fs::write(run.path().join(format!("checkpoints/step-{victim}/optimizer.safetensors")), b"x").unwrap();
                }
                _ => {
                    fs::create_dir_all(run.path().join("checkpoints/.tmp-step-99-x/")).unwrap();
                    fs::write(run.path().join("checkpoints/.tmp-step-99-x/optimizer.safetensors"), b"half").unwrap();
                }
            }
        }
        match find_checkpoint(run.path()) {
            Ok(found) => prop_assert_eq!(found.map(|f| f.manifest.step), whole.last().copied()),
            Err(Error::NoGoodCheckpoint { .. }) => prop_assert!(whole.is_empty() && step > 0),
            Err(e) => prop_assert!(false, "{e}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Any bytes in place of a part of a manifest are an error and never a panic.
    #[test]
    fn any_bytes_in_a_manifest_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..2000) {
        let manifest =
            Manifest { format_version: 1, step: 5, run: identity(), state: state(5), files: BTreeMap::new() };
        let whole = manifest.to_text().unwrap().into_bytes();
        let mut text = whole.clone();
        text.splice(cut.min(text.len())..(cut + 40).min(text.len()), bytes);
        prop_assume!(text != whole);
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(MANIFEST_FILE), text).unwrap();
        let refused = matches!(Manifest::read(dir.path()), Err(Error::CheckpointDamaged { .. }));
        prop_assert!(refused);
    }
}

#[test]
fn another_number_of_processes_may_go_on() {
    let old = identity();
    let mut new = old.clone();
    (new.world_size, new.threads) = (4, 1);
    let taken = compare_for_resume(&old, &new, &[]).unwrap();
    let told: Vec<String> = taken.iter().map(ToString::to_string).collect();
    assert_eq!(told, ["threads was 2 and is 1", "world_size was 1 and is 4"]);
    new.config.insert("lora.r".into(), "16".into());
    assert!(compare_for_resume(&old, &new, &[]).unwrap_err().to_string().contains("lora.r was 8 and is 16"));
}
