//! Crafted safetensors files: each is refused with an error that names the file and what is wrong, or is read.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use lora_format::{Error, HeaderFault, TensorFault, TensorFile};
use std::path::PathBuf;
use tempfile::TempDir;

/// A file with this header, padded as it is, and this many bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(std::iter::repeat_n(7u8, data));
    bytes
}

fn open(bytes: &[u8]) -> Result<TensorFile, Error> {
    let (_dir, path) = write(bytes, "w.safetensors");
    TensorFile::open(&path)
}

fn write(bytes: &[u8], name: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

/// The message for a refused file; it must name the file.
fn refusal(bytes: &[u8]) -> String {
    let text = open(bytes).expect_err("the file must be refused").to_string();
    assert!(text.contains("w.safetensors"), "{text}");
    assert!(text.len() < 600, "{text}");
    text
}

fn entry(name: &str, dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
}

fn one(dtype: &str, shape: &str, offsets: &str, data: usize) -> Vec<u8> {
    file(&format!("{{{}}}", entry("a", dtype, shape, offsets)), data)
}

fn two(first: &str, second: &str, data: usize) -> Vec<u8> {
    let (a, b) = (entry("a", "U8", "[2]", first), entry("b", "U8", "[2]", second));
    file(&format!("{{{a},{b}}}"), data)
}

#[test]
fn faulty_headers_are_refused() {
    let mut past_end = file("{}", 0);
    past_end[0] = 200;
    let mut huge = file("{}", 0);
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let bad_utf8 = {
        let mut bytes = file(r#"{"x":1}"#, 0);
        bytes[10] = 0xff;
        bytes
    };
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    let long_shape = format!("[{}]", vec!["1"; 1000].join(","));
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty file", vec![], "too few"),
        ("seven bytes", vec![0; 7], "too few"),
        ("length past the file", past_end, "truncated"),
        ("length of 2^64 - 1", huge, "100000000"),
        ("empty header", file("", 4), "begin with `{`"),
        ("leading space", file(" {}", 0), "begin with `{`"),
        ("a list", file("[]", 0), "begin with `{`"),
        ("broken JSON", file("{\"a\":", 0), "header: EOF"),
        ("bad UTF-8", bad_utf8, "header: "),
        ("deep nesting", file(&deep, 0), "header: "),
        ("metadata that is no string", file(r#"{"__metadata__":{"x":1}}"#, 0), "expected a string"),
        ("metadata twice", file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), "`__metadata__` is there twice"),
        ("same name twice", file(&format!("{{{0},{0}}}", entry("a", "U8", "[2]", "[0,2]")), 2), "`a` is there twice"),
        ("no shape", file(r#"{"a":{"dtype":"U8","data_offsets":[0,0]}}"#, 0), "missing field `shape`"),
        ("a thousand dimensions", one("U8", &long_shape, "[0,1]", 1), "at most 16"),
        ("fractional size", one("U8", "[2.5]", "[0,2]", 2), "header: "),
        ("negative size", one("U8", "[-2]", "[0,2]", 2), "header: "),
        ("unknown dtype", one("F8_E4M3", "[2]", "[0,2]", 2), "tensor `a`: dtype F8_E4M3"),
        ("negative offset", one("U8", "[2]", "[-2,0]", 2), "header: "),
        ("reversed offsets", one("U8", "[2]", "[2,0]", 2), "tensor `a`: bytes 2..0"),
        ("offsets past the data", one("U8", "[4]", "[0,4]", 2), "tensor `a`: bytes 0..4"),
        ("offsets past an address", one("U8", "[2]", "[0,18446744073709551615]", 2), "tensor `a`: bytes"),
        ("size that disagrees", one("F32", "[2]", "[0,4]", 4), "tensor `a`: 4 bytes, where shape and dtype need 8"),
        ("shape that overflows", one("F32", "[4611686018427387904,4]", "[0,4]", 4), "overflows"),
        ("one size past i64", one("F32", "[18446744073709551615]", "[0,4]", 4), "overflows"),
        ("overlap", two("[0,2]", "[1,3]", 3), "tensor `b`: overlaps tensor `a`"),
        ("same range twice", two("[0,2]", "[0,2]", 2), "overlaps"),
        ("hole in front", one("U8", "[2]", "[1,3]", 3), "bytes 0..1"),
        ("hole between", two("[0,2]", "[3,5]", 5), "bytes 2..3"),
        ("trailing byte", one("U8", "[2]", "[0,2]", 3), "bytes 2..3"),
        ("truncated data", one("U8", "[2]", "[0,2]", 1), "tensor `a`: bytes 0..2 do not lie in the 1 bytes"),
    ];
    for (what, bytes, wanted) in cases {
        let text = refusal(&bytes);
        assert!(text.contains(wanted), "{what}: {text}");
    }
}

#[test]
fn odd_but_lawful_files_are_read() {
    let nan = {
        let mut bytes = one("F32", "[1]", "[0,4]", 0);
        bytes.extend(f32::NAN.to_le_bytes());
        bytes
    };
    let read = open(&nan).unwrap().read("a").unwrap();
    assert!(f32::try_from(&read).unwrap().is_nan());

    let empty = open(&one("F32", "[0,5]", "[0,0]", 0)).unwrap();
    assert_eq!(empty.read("a").unwrap().size(), [0, 5]);
    assert_eq!(open(&file("{}   ", 0)).unwrap().names().count(), 0);

    // A name is a key and nothing else: no file is opened by it.
    let named = file(&format!("{{{}}}", entry("../../x", "U8", "[2]", "[0,2]")), 2);
    assert_eq!(open(&named).unwrap().bytes("../../x").unwrap(), [7, 7]);

    // Mixed order, a zero-sized tensor between, metadata.
    let mixed = format!(
        r#"{{"__metadata__":{{"format":"pt"}},{},{},{}}}"#,
        entry("z", "I64", "[]", "[2,10]"),
        entry("e", "U8", "[0]", "[2,2]"),
        entry("b", "BF16", "[1]", "[0,2]")
    );
    let mixed = open(&file(&mixed, 10)).unwrap();
    assert_eq!(mixed.metadata()["format"], "pt");
    assert_eq!(mixed.names().collect::<Vec<_>>(), ["b", "e", "z"]);
    assert_eq!(mixed.read("z").unwrap().int64_value(&[]), 0x0707_0707_0707_0707);
}

#[test]
fn errors_are_typed_and_a_missing_tensor_is_named() {
    let file = open(&one("U8", "[2]", "[0,2]", 2)).unwrap();
    match file.read("b").unwrap_err() {
        Error::Tensor { tensor, fault: TensorFault::Missing, .. } => assert_eq!(tensor, "b"),
        other => panic!("{other}"),
    }
    match open(&[0; 3]).unwrap_err() {
        Error::Header { fault: HeaderFault::TooShort { bytes: 3 }, .. } => {}
        other => panic!("{other}"),
    }
}

#[test]
fn pickles_are_refused_by_name_and_by_content() {
    for name in ["pytorch_model.bin", "a.pt", "a.pth", "a.ckpt", "A.PT"] {
        let (_dir, path) = write(b"anything", name);
        assert!(matches!(TensorFile::open(&path), Err(Error::Pickle { .. })), "{name}");
    }
    for magic in [&b"PK\x03\x04rest of a zip"[..], b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x04\x95rest"] {
        let (_dir, path) = write(magic, "model.safetensors");
        let error = TensorFile::open(&path).unwrap_err();
        assert!(matches!(error, Error::Pickle { .. }), "{error}");
        assert!(error.to_string().contains("safetensors.torch.save_file"));
    }
    // A header of 640 bytes begins like a pickle, and is none.
    let padded = format!("{{}}{}", " ".repeat(638));
    assert_eq!(&file(&padded, 0)[..2], [0x80, 2]);
    assert!(open(&file(&padded, 0)).is_ok());
}
