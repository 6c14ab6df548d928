//! R6 to R9, R18, R19: checkpoints that are not what was written.

use crate::lab::{Lab, Random, SAVE, STEPS, contents, copy, names};
use crate::report::{Row, extent, long};
use lora_train::checkpoint::find_checkpoint;
use std::path::Path;
use std::process::Command;

const NEWEST: u64 = 2 * SAVE;

/// The newest checkpoint is hurt, so a run must go on from the one before, say so, keep the hurt one, and end as ever.
#[track_caller]
fn falls_back(lab: &Lab, what: &str) {
    let older = contents(&lab.checkpoint("run", SAVE));
    let done =
        lab.train("run", &["--resume"]).exits(0).says(&["a damaged checkpoint was put aside", "quarantine-step-10"]);
    assert!(contents(&lab.checkpoint("run", SAVE)) == older, "{what}: the older checkpoint changed");
    let aside = names(&lab.path("run/checkpoints"));
    assert!(aside.contains(&"quarantine-step-10.reason.txt".to_string()), "{what}: {done:#?}");
    lab.is_whole("run", what);
}

/// The same, seen by the library alone, which takes no time.
#[track_caller]
fn is_detected(run: &Path, what: &str) {
    let found = find_checkpoint(run).unwrap().unwrap();
    assert_eq!((found.manifest.step, found.quarantined.len()), (SAVE, 1), "{what}");
}

#[test]
fn r06_a_flipped_bit() {
    let row = Row::new("R6");
    let (lab, flips, through) = (Lab::new(), extent(50, 1000), extent(2, 20));
    let checkpoints = lab.interrupted("run").join("checkpoints");
    let whole = lab.path("pristine");
    copy(&checkpoints, &whole);
    let files = contents(&whole.join("step-10"));
    let mut random = Random(6);
    let total: u64 = files.values().map(|file| file.len() as u64).sum();
    for flip in 0..flips {
        let _ = std::fs::remove_dir_all(&checkpoints);
        copy(&whole, &checkpoints);
        // A place among all bytes of all files.
        let mut at = random.below(total);
        let (name, bytes) = files
            .iter()
            .find(|(_, file)| {
                at < file.len() as u64 || {
                    at -= file.len() as u64;
                    false
                }
            })
            .unwrap();
        let mut bytes = bytes.clone();
        bytes[at as usize] ^= 1 << random.below(8);
        std::fs::write(checkpoints.join("step-10").join(name), bytes).unwrap();
        let what = format!("flip {flip} at byte {at} of {name}");
        if flip % (flips / through) == 0 { falls_back(&lab, &what) } else { is_detected(&lab.path("run"), &what) }
    }
    row.held(&format!(
        "{flips} of {flips} flips over {} files of {total} bytes found, put aside, and the older one taken; {through} of them \
         through the program to the end, 0 differences",
        files.len()
    ));
}

#[test]
fn r07_a_file_cut_short() {
    let row = Row::new("R7");
    let lab = Lab::new();
    let mut cuts = 0;
    for (name, bytes) in contents(&lab.checkpoint("whole", NEWEST)) {
        for left in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            lab.interrupted("run");
            std::fs::write(lab.checkpoint("run", NEWEST).join(&name), &bytes[..left]).unwrap();
            let what = format!("{name} cut to {left}");
            if long() || left == 1 {
                falls_back(&lab, &what)
            } else {
                is_detected(&lab.path("run"), &what)
            }
            cuts += 1;
        }
    }
    row.held(&format!("{cuts} of {cuts} found, put aside, and the older one taken; 0 differences"));
}

#[test]
fn r08_a_file_missing_added_or_swapped() {
    let row = Row::new("R8");
    let lab = Lab::new();
    let mut cases = 0;
    for (name, _) in contents(&lab.checkpoint("whole", NEWEST)) {
        let dir = |step| lab.checkpoint("run", step);
        let hurts: [(&str, &dyn Fn()); 3] = [
            ("missing", &|| std::fs::remove_file(dir(NEWEST).join(&name)).unwrap()),
            ("added", &|| {
                let _bytes = std::fs::copy(dir(NEWEST).join(&name), dir(NEWEST).join(format!("{name}.more"))).unwrap();
            }),
            ("swapped", &|| {
                let other = lab.checkpoint("whole", STEPS).join(&name);
                let _bytes = std::fs::copy(other, dir(NEWEST).join(&name)).unwrap();
            }),
        ];
        for (how, hurt) in hurts {
            lab.interrupted("run");
            let before = std::fs::read(dir(NEWEST).join(&name)).unwrap();
            hurt();
            let what = format!("{name} {how}");
            if std::fs::read(dir(NEWEST).join(&name)).is_ok_and(|now| now == before) && how == "swapped" {
                // The same bytes in every checkpoint, as of the adapter's config: nothing was swapped.
                continue;
            }
            if long() || how == "missing" {
                falls_back(&lab, &what)
            } else {
                is_detected(&lab.path("run"), &what)
            }
            cases += 1;
        }
    }
    row.held(&format!("{cases} of {cases} found, put aside, and the older one taken; 0 differences"));
}

#[test]
fn r09_every_checkpoint_bad() {
    let row = Row::new("R9");
    let lab = Lab::new();
    let run = lab.interrupted("run");
    let state = |step| lab.checkpoint("run", step).join("trainer_state.safetensors");
    std::fs::write(state(SAVE), b"nothing").unwrap();
    std::fs::remove_file(state(NEWEST)).unwrap();
    let log = std::fs::read(run.join("metrics.jsonl")).unwrap();
    for start in ["the first", "the second"] {
        let done = lab.train("run", &["--resume"]).exits(1).says(&[
            "no checkpoint can be used",
            "quarantine-step-5: trainer_state.safetensors has 7 bytes",
            "quarantine-step-10: trainer_state.safetensors is missing",
            "choose another output_dir",
        ]);
        assert!(!run.join("adapter_model.safetensors").exists(), "{start} start: {done:#?}");
        // Nor without --resume, from the beginning, over what is there.
        lab.train("run", &[]).exits(2).says(&["holds the checkpoints of a run", "--resume"]);
    }
    assert!(std::fs::read(run.join("metrics.jsonl")).unwrap() == log, "the metrics changed");
    row.held("2 of 2 bad ones listed with their reasons, at each of 2 starts; nothing started from step 0");
}

#[test]
fn r18_a_checkpoint_of_a_later_version() {
    let row = Row::new("R18");
    let lab = Lab::new();
    lab.interrupted("run");
    let manifest = lab.checkpoint("run", NEWEST).join("manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let later = text.replacen("\"format_version\": 1", "\"format_version\": 2", 1);
    assert!(later != text);
    std::fs::write(&manifest, &later).unwrap();
    let before = contents(&lab.checkpoint("run", NEWEST));
    lab.train("run", &["--resume"]).exits(1).says(&[
        "step-10",
        "format_version = 2",
        "reads up to 1",
        "use the version that wrote it",
    ]);
    assert!(contents(&lab.checkpoint("run", NEWEST)) == before);
    assert_eq!(lab.checkpoints("run"), [SAVE, NEWEST]);
    row.held("refused with both versions named, not touched");
}

#[test]
fn r19_clocks_and_time_zones() {
    let row = Row::new("R19");
    let lab = Lab::new();
    let zones = ["UTC", "Asia/Kolkata", "America/St_Johns"];
    for (zone, date) in zones.iter().zip(["1970-01-02", "2037-12-31", "2000-02-29"]) {
        let run = lab.interrupted("run");
        // The older checkpoint seems the newer, and everything else of another time.
        let touch = |path: &Path, date: &str| {
            assert!(Command::new("touch").args(["-d", date]).arg(path).status().unwrap().success());
        };
        for step in [SAVE, NEWEST] {
            let dir = lab.checkpoint("run", step);
            names(&dir).iter().for_each(|name| touch(&dir.join(name), if step == SAVE { "2037-12-31" } else { date }));
            touch(&dir, if step == SAVE { "2037-12-31" } else { date });
        }
        touch(&run.join("metrics.jsonl"), date);
        let done = lab.command("run", &["--resume", "--json"]).env("TZ", zone).output().unwrap();
        assert!(done.status.success());
        lab.is_whole("run", zone);
        // It went on from step 10: what ran anew are the last steps, and the log has them once.
        assert!(lab.checkpoint("run", STEPS).is_dir());
    }
    row.held("3 of 3: the step decides and not the time; 0 differences");
}
