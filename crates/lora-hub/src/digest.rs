//! What the hub says of a file's content: SHA-256 of large ones, git's own id of small ones.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

/// The digest of a file, which is also the name of its blob in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Digest {
    Sha256(String),
    /// SHA-1 over `blob LENGTH\0` and the content.
    Git(String),
}

impl Digest {
    /// A digest by its length in hexadecimal; whatever else a server says is none, and no name of a file either.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let hex = text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        match (hex, text.len()) {
            (true, 64) => Some(Self::Sha256(text.to_owned())),
            (true, 40) => Some(Self::Git(text.to_owned())),
            _ => None,
        }
    }

    /// The name of the blob.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::Git(hex) => hex,
        }
    }

    /// The digest of the same kind that a file has.
    pub(crate) fn of_file(&self, path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        match self {
            Self::Sha256(_) => Ok(Self::Sha256(hash(Sha256::new(), &mut file)?)),
            Self::Git(_) => {
                let mut hasher = Sha1::new();
                hasher.update(format!("blob {}\0", file.metadata()?.len()));
                Ok(Self::Git(hash(hasher, &mut file)?))
            }
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sha256(hex) => write!(f, "sha256 {hex}"),
            Self::Git(hex) => write!(f, "git blob {hex}"),
        }
    }
}

fn hash<D: sha2::Digest>(mut hasher: D, file: &mut File) -> io::Result<String> {
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            read => hasher.update(&buffer[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_git_and_sha256() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "hello\n").unwrap();
        // `printf 'hello\n' | git hash-object --stdin` and `sha256sum`.
        let git = Digest::parse("ce013625030ba8dba906f756967f9e9ca394464a").unwrap();
        let sha = Digest::parse("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03").unwrap();
        assert_eq!((git.of_file(file.path()).unwrap(), sha.of_file(file.path()).unwrap()), (git, sha));
        for bad in ["", "../x", "CE013625030BA8DBA906F756967F9E9CA394464A", "ce01"] {
            assert_eq!(Digest::parse(bad), None, "{bad}");
        }
    }
}
