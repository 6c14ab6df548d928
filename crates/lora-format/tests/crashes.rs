//! A process that dies, or whose disk is full, in the middle of a write leaves the old file as it was.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use lora_format::{TensorFile, write_tensors};
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tch::{Device, Kind, Tensor};

const TARGET: &str = "LORA_FORMAT_TEST_TARGET";
const SIGXFSZ: i32 = 25;

fn write_large(path: &Path) -> lora_format::Result<()> {
    let large = Tensor::ones([1 << 18], (Kind::Float, Device::Cpu));
    write_tensors(path, &[("large".to_string(), large)], &BTreeMap::new())
}

/// Also the child's part of the tests below, which give it a target and a limit that the file exceeds.
#[test]
fn a_file_of_a_mebibyte_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = std::env::var_os(TARGET).map_or_else(|| dir.path().join("t.safetensors"), PathBuf::from);
    write_large(&path).map_err(|e| e.to_string()).unwrap();
    assert_eq!(TensorFile::open(&path).unwrap().data_bytes(), 1 << 20);
}

/// Runs the child with files limited to 64 KiB; `before` is a shell command that goes first.
fn limited(target: &Path, before: &str) -> Output {
    let script = format!("{before} ulimit -f 64; exec \"$0\" --exact a_file_of_a_mebibyte_is_written");
    let exe = std::env::current_exe().unwrap();
    Command::new("bash").arg("-c").arg(script).arg(exe).env(TARGET, target).output().unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_process_killed_while_writing_leaves_the_old_file_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    let child = limited(&path, "");
    assert_eq!(child.status.signal(), Some(SIGXFSZ), "{child:?}");
    assert!(!path.exists());

    let small = [("small".to_string(), Tensor::from(1.5f32))];
    write_tensors(&path, &small, &BTreeMap::new()).unwrap();
    let before = std::fs::read(&path).unwrap();
    assert_eq!(limited(&path, "").status.signal(), Some(SIGXFSZ));
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert!(names(dir.path()).iter().all(|name| name == "t.safetensors" || name.starts_with(".tmp-")));
    write_large(&path).unwrap();
    assert!(TensorFile::open(&path).unwrap().contains("large"));
}

#[test]
fn a_write_that_fails_names_the_path_and_removes_what_it_began() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    let small = [("small".to_string(), Tensor::from(1.5f32))];
    write_tensors(&path, &small, &BTreeMap::new()).unwrap();
    // With the signal ignored, the write past the limit fails with an error, as on a full disk.
    let child = limited(&path, "trap '' XFSZ;");
    assert_eq!(child.status.code(), Some(101), "{child:?}");
    let text = String::from_utf8_lossy(&child.stdout).into_owned() + &String::from_utf8_lossy(&child.stderr);
    assert!(text.contains(&format!("cannot write {}: File too large (os error 27)", path.display())), "{text}");
    assert!(TensorFile::open(&path).unwrap().contains("small"));
    assert_eq!(names(dir.path()), ["t.safetensors"]);
}
