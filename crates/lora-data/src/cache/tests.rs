//! A file that is not whole is never taken for one, wherever it was cut off or changed.

use std::path::Path;
use std::sync::Arc;

use super::layout::{HEAD, Key};
use super::reader::TokenFile;
use super::writer::Writer;
use super::{Meta, Rows};
use crate::document::Origin;
use crate::example::Example;
use crate::report::DataReport;

const KEY: Key = [7; 32];

fn examples() -> Vec<Example> {
    let file: Arc<Path> = Path::new("data.jsonl").into();
    (1..6_u32)
        .map(|row| Example {
            input_ids: (0..row).map(|t| 1000 * row + t).collect(),
            trained: (0..row).map(|t| t > 0 && (t + row) % 3 > 0).collect(),
            origin: Origin { file: file.clone(), record: row as usize, line: 2 * row as usize },
        })
        .collect()
}

/// The bytes of a file of tokens.
fn written(dir: &Path) -> Vec<u8> {
    let mut writer = Writer::create(dir, KEY).unwrap();
    for example in examples() {
        writer.add(&example, &example.fingerprint()).unwrap();
    }
    let meta = Meta { files: writer.files(), source_ends: vec![5], good: String::new(), report: DataReport::default() };
    std::fs::read(writer.finish(&meta).unwrap().path()).unwrap()
}

/// What a file of these bytes holds; none when it is refused as a whole, an error when one of its rows is.
fn read(dir: &Path, bytes: &[u8]) -> Option<crate::Result<Vec<Example>>> {
    let path = dir.join("file");
    std::fs::write(&path, bytes).unwrap();
    let (file, _) = TokenFile::open(&path, &KEY)?;
    let rows = Rows::from(file);
    Some((0..rows.len()).map(|row| rows.example(row)).collect())
}

#[test]
fn what_is_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = written(dir.path());
    assert_eq!(read(dir.path(), &bytes).unwrap().unwrap(), examples());
    assert!(TokenFile::open(&dir.path().join("file"), &[8; 32]).is_none(), "another key is another file");
    assert!(TokenFile::open(&dir.path().join("none"), &KEY).is_none());
    let (file, meta) = TokenFile::open(&dir.path().join("file"), &KEY).unwrap();
    assert_eq!((file.highest_token(), meta.source_ends), (Some(5004), vec![5]));
    let (rows, memory) = (Rows::from(file), Rows::from(examples()));
    assert_eq!(rows.lengths(), memory.lengths());
    assert_eq!((rows.tokens(), rows.trained_tokens()), (memory.tokens(), memory.trained_tokens()));
    assert_eq!(rows.digest(), memory.digest());
    let order = vec![4, 0, 0, 2];
    let (some, of_memory) = (rows.select(order.clone()).unwrap(), memory.select(order).unwrap());
    assert_eq!(some.digest(), of_memory.digest());
    assert_eq!(some.highest_token().unwrap(), Some(5004));
    assert_eq!((some.example(3).unwrap(), some.lengths()), (examples()[2].clone(), vec![5, 1, 1, 3]));
    let again = some.select(vec![3]).unwrap();
    assert_eq!((again.len(), again.origin(0).unwrap()), (1, examples()[2].origin.clone()));
    assert!(some.example(4).is_err() && some.select(vec![4]).is_err() && rows.origin(5).is_err());
}

#[test]
fn cut_off_at_any_length_it_is_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = written(dir.path());
    for length in 0..bytes.len() {
        assert!(read(dir.path(), &bytes[..length]).is_none(), "{length} of {} bytes were taken", bytes.len());
    }
    let longer = [bytes.as_slice(), &[0; 8]].concat();
    assert!(read(dir.path(), &longer).is_none());
    let doubled = bytes.repeat(2);
    assert!(read(dir.path(), &doubled).is_none(), "one file behind another");
}

#[test]
fn a_changed_byte_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = written(dir.path());
    let tokens = 4 * examples().iter().map(|e| e.input_ids.len()).sum::<usize>();
    let filling = HEAD + tokens..(HEAD + tokens).next_multiple_of(8);
    for at in 0..bytes.len() {
        for bit in [0, 7] {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            match read(dir.path(), &changed) {
                Some(Ok(rows)) => assert!(filling.contains(&at) && rows == examples(), "byte {at} was not noticed"),
                Some(Err(error)) => {
                    assert!((HEAD..HEAD + tokens).contains(&at), "byte {at} was noticed too late");
                    assert!(matches!(error, crate::DataError::CacheDamaged { .. }), "{error}");
                }
                None => assert!(!(HEAD..filling.end).contains(&at)),
            }
        }
    }
}
