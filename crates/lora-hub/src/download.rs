//! One file: begun, cut, gone on with, whole, checked.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use ureq::http::HeaderMap;

use crate::client::{Client, Fault, text};
use crate::digest::Digest;
use crate::error::{HubError, Result};
use crate::listing::Known;

/// An attempt that brings so many bytes, or a thousandth of the file, counts as one that went well.
const PROGRESS: u64 = 1 << 20;

/// A file to be downloaded.
pub(crate) struct Download<'a> {
    pub(crate) client: &'a Client<'a>,
    /// In words.
    pub(crate) what: &'a str,
    pub(crate) file: &'a str,
    /// Where the hub has it.
    pub(crate) address: String,
    pub(crate) known: &'a Known,
    /// Where it is written until it is whole.
    pub(crate) partial: &'a Path,
}

/// What is told of a download on its way.
pub(crate) enum Step {
    /// So many bytes are there.
    At(u64),
    /// It was cut, for this reason, and is gone on with.
    Again(String),
}

impl Download<'_> {
    /// Downloads and checks the file. What is there already is kept.
    ///
    /// # Errors
    /// [`HubError::Mismatch`] when it is not what the hub announced, twice; [`HubError::Cut`] when it does not come to an end.
    pub(crate) fn run(&self, tell: &mut dyn FnMut(Step)) -> Result<()> {
        let mut once = false;
        loop {
            self.complete(tell)?;
            let got = self.known.digest.of_file(self.partial).map_err(HubError::io("read", self.partial))?;
            if got == self.known.digest {
                let flushed = File::open(self.partial).and_then(|file| file.sync_all());
                flushed.map_err(HubError::io("flush", self.partial))?;
                self.forget_tag();
                return Ok(());
            }
            self.remove()?;
            if once {
                return Err(self.mismatch(&got));
            }
            once = true;
            tell(Step::Again("it was not what the hub announced".into()));
        }
    }

    fn mismatch(&self, got: &Digest) -> HubError {
        HubError::Mismatch {
            what: self.what.into(),
            file: self.file.into(),
            wanted: self.known.digest.to_string(),
            got: got.to_string(),
        }
    }

    /// Bytes until all are there.
    fn complete(&self, tell: &mut dyn FnMut(Step)) -> Result<()> {
        let size = self.known.size;
        let enough = PROGRESS.min(size / 1000).max(1);
        let mut failures = 0;
        // Whether the server was seen not to know what a part is.
        let mut whole = false;
        loop {
            let before = self.have()?;
            tell(Step::At(before));
            if before == size && (size > 0 || self.partial.exists()) {
                return Ok(());
            }
            let (reason, wait) = match self.attempt(if whole { 0 } else { before }, &mut whole, tell) {
                Ok(()) => ("the connection ended".to_owned(), None),
                Err(Fault::Final(error)) => return Err(*error),
                Err(Fault::Passing { reason, wait }) => (reason, wait),
            };
            let now = self.have()?;
            if now == size {
                continue;
            }
            failures = if now >= before + enough { 0 } else { failures + 1 };
            if failures > self.client.settings().retries {
                let (what, file) = (self.what.into(), self.file.into());
                return Err(HubError::Cut { what, file, done: now, size, reason });
            }
            tell(Step::Again(reason));
            if failures > 0 {
                self.client.pause(failures - 1, wait);
            }
        }
    }

    /// What is there already; too much is nothing.
    fn have(&self) -> Result<u64> {
        let have = match fs::metadata(self.partial) {
            Ok(metadata) => metadata.len(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
            Err(e) => return Err(HubError::io("read", self.partial)(e)),
        };
        if have <= self.known.size {
            return Ok(have);
        }
        self.remove()?;
        Ok(0)
    }

    /// One request, from byte `from` on.
    fn attempt(&self, from: u64, whole: &mut bool, tell: &mut dyn FnMut(Step)) -> std::result::Result<(), Fault> {
        let mut headers = Vec::new();
        let tag = self.tag();
        if from > 0 {
            headers.push(("range", format!("bytes={from}-")));
            headers.extend(tag.clone().map(|tag| ("if-range", tag)));
        }
        let mut reply = self.client.get(&self.address, &headers)?;
        let status = reply.response.status().as_u16();
        if status == 416 {
            self.remove()?;
            return Err(Fault::passing("the server knows no such part"));
        }
        self.client.expect_ok(&reply, &format!("{} of {}", self.file, self.what))?;
        let answer = reply.response.headers();
        let now = strong_tag(answer);
        if status == 206 && from > 0 {
            if part(answer) != Some((from, self.known.size)) {
                // A server that gives other parts than it was asked for is asked for the whole.
                *whole = true;
                self.remove()?;
                return Err(Fault::passing("the server sent another part than it was asked for"));
            }
            if tag.is_some() && tag != now {
                self.remove()?;
                return Err(Fault::passing("the file changed meanwhile"));
            }
        } else if status == 200 {
            self.begin(now.as_deref())?;
        } else {
            return Err(Fault::passing(format!("the answer was status {status}")));
        }
        let start = if status == 206 { from } else { 0 };
        let length = text(answer, "content-length").and_then(|length| length.parse::<u64>().ok());
        if let Some(length) = length.filter(|length| *length != self.known.size - start) {
            self.remove()?;
            let size = self.known.size;
            return Err(Fault::passing(format!(
                "the server announced {length} bytes from {start} on of a file of {size}"
            )));
        }
        let limit = self.known.size - start;
        self.copy(&mut reply.response.body_mut().with_config().limit(u64::MAX).reader().take(limit), start, tell)
    }

    /// Starts from nothing.
    fn begin(&self, tag: Option<&str>) -> Result<()> {
        self.remove()?;
        match tag {
            Some(tag) => fs::write(self.tag_file(), tag).map_err(HubError::io("write", &self.tag_file())),
            None => Ok(()),
        }
    }

    /// Takes what comes, while it comes fast enough.
    fn copy(&self, from: &mut dyn Read, start: u64, tell: &mut dyn FnMut(Step)) -> std::result::Result<(), Fault> {
        let options = OpenOptions::new().create(true).append(true).open(self.partial);
        let mut file = options.map_err(HubError::io("open", self.partial))?;
        let settings = self.client.settings();
        let least = settings.read_timeout.as_secs_f64() * settings.min_rate as f64;
        let mut buffer = vec![0; 1 << 16];
        let (mut at, mut window, mut since) = (start, start, Instant::now());
        loop {
            let read = match from.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(read) => read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Fault::passing(e.to_string())),
            };
            file.write_all(&buffer[..read]).map_err(HubError::io("write", self.partial))?;
            at += read as u64;
            tell(Step::At(at));
            if since.elapsed() >= settings.read_timeout {
                if ((at - window) as f64) < least {
                    return Err(Fault::passing(format!("it came with less than {} bytes a second", settings.min_rate)));
                }
                (window, since) = (at, Instant::now());
            }
        }
    }

    /// By what the server told apart the version that was begun.
    fn tag(&self) -> Option<String> {
        fs::read_to_string(self.tag_file())
            .ok()
            .filter(|tag| !tag.is_empty() && tag.bytes().all(|b| b.is_ascii_graphic()))
    }

    fn tag_file(&self) -> PathBuf {
        // The ending is that of other unfinished files, so that those who tidy up the cache take it along.
        self.partial.with_extension("tag.incomplete")
    }

    fn forget_tag(&self) {
        // Where it stays, it says something of a file that is no more.
        let _ = fs::remove_file(self.tag_file());
    }

    fn remove(&self) -> Result<()> {
        self.forget_tag();
        match fs::remove_file(self.partial) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(HubError::io("remove", self.partial)(e)),
            _ => Ok(()),
        }
    }
}

/// The tag of a version, where equal tags mean equal bytes.
fn strong_tag(headers: &HeaderMap) -> Option<String> {
    text(headers, "etag").filter(|tag| tag.starts_with('"')).map(str::to_owned)
}

/// Start and size of the whole of the part that was sent: `bytes 5-9/10`. The part must reach to the end.
fn part(headers: &HeaderMap) -> Option<(u64, u64)> {
    let (range, size) = text(headers, "content-range")?.strip_prefix("bytes ")?.split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let (start, end, size): (u64, u64, u64) = (start.parse().ok()?, end.parse().ok()?, size.parse().ok()?);
    (end.checked_add(1) == Some(size)).then_some((start, size))
}
