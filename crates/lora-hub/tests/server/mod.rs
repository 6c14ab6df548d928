//! A hub on this machine, with a store beside it that large files are redirected to, and every fault that a test asks for.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test file uses a part; a helper that fails is a failed test

use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What was asked.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// By names in small letters.
    pub headers: BTreeMap<String, String>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The byte that a part is asked for from.
    pub fn range(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// What is answered.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Closes the connection after so many bytes of the body.
    pub cut: Option<usize>,
    /// Sends so many bytes at a time, with a pause between.
    pub pace: Option<(usize, Duration)>,
    /// Whether the length is told.
    pub length: bool,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), cut: None, pace: None, length: true }
    }

    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.retain(|(known, _)| known != name);
        self.headers.push((name.into(), value.into()));
        self
    }
}

type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

/// A server on a port of its own.
pub struct Server {
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    log: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    pub fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, log) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (stopped, seen, handler): (_, _, Arc<Handler>) = (Arc::clone(&stop), Arc::clone(&log), Arc::new(handler));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (seen, handler) = (Arc::clone(&seen), Arc::clone(&handler));
                std::thread::spawn(move || {
                    // A client that has gone away has its reasons.
                    let _ = serve(&stream, &seen, handler.as_ref());
                });
            }
        });
        Self { address, stop, log }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What was asked so far.
    pub fn log(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    /// The requests whose path has a part.
    pub fn asked(&self, part: &str) -> Vec<Request> {
        self.log().into_iter().filter(|r| r.path.contains(part)).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(stream: &TcpStream, log: &Mutex<Vec<Request>>, handler: &Handler) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut words = first.split(' ');
    let (method, path) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    if method.is_empty() {
        return Ok(());
    }
    let request = Request { method, path, headers };
    log.lock().unwrap().push(request.clone());
    let reply = handler(&request);
    let mut stream = stream;
    let mut head = format!("HTTP/1.1 {} X\r\nconnection: close\r\n", reply.status);
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    if reply.length && !reply.headers.iter().any(|(name, _)| name == "content-length") {
        head += &format!("content-length: {}\r\n", reply.body.len());
    }
    stream.write_all((head + "\r\n").as_bytes())?;
    if request.method == "HEAD" {
        return Ok(());
    }
    let body = &reply.body[..reply.cut.unwrap_or(reply.body.len()).min(reply.body.len())];
    let (step, pause) = reply.pace.unwrap_or((body.len().max(1), Duration::ZERO));
    for piece in body.chunks(step) {
        stream.write_all(piece)?;
        stream.flush()?;
        std::thread::sleep(pause);
    }
    Ok(())
}

/// A file as a server gives it: whole, or the part that is asked for.
pub fn file_reply(request: &Request, bytes: &[u8], etag: &str) -> Reply {
    let tag = format!("\"{etag}\"");
    let same = request.header("if-range").is_none_or(|wanted| wanted == tag);
    match request.range().filter(|_| same) {
        Some(from) if from >= bytes.len() => Reply::new(416, ""),
        Some(from) => Reply::new(206, &bytes[from..])
            .with("content-range", format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len()))
            .with("etag", tag),
        None => Reply::new(200, bytes).with("etag", tag),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub fn git_blob(bytes: &[u8]) -> String {
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {}\0", bytes.len()));
    hasher.update(bytes);
    hex(&hasher.finalize())
}

/// Bytes that look like nothing.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// A repository at a commit.
#[derive(Debug, Clone)]
pub struct Content {
    /// `models` or `datasets`.
    pub kind: &'static str,
    pub id: String,
    pub commit: String,
    /// Name, content, and whether it is a large one.
    pub files: Vec<(String, Vec<u8>, bool)>,
}

impl Content {
    pub fn new(kind: &'static str, id: &str, commit: char) -> Self {
        Self { kind, id: id.into(), commit: commit.to_string().repeat(40), files: Vec::new() }
    }

    pub fn file(mut self, name: &str, bytes: impl Into<Vec<u8>>) -> Self {
        self.files.push((name.into(), bytes.into(), false));
        self
    }

    pub fn large(mut self, name: &str, bytes: impl Into<Vec<u8>>) -> Self {
        self.files.push((name.into(), bytes.into(), true));
        self
    }

    /// What the hub says of it, by branch `main` and by commit.
    pub fn listing(&self) -> String {
        let sibling = |(name, bytes, large): &(String, Vec<u8>, bool)| {
            let (size, blob) = (bytes.len(), git_blob(bytes));
            match large {
                false => serde_json::json!({"rfilename": name, "size": size, "blobId": blob}),
                true => serde_json::json!({"rfilename": name, "size": size, "blobId": "0".repeat(40),
                    "lfs": {"sha256": sha256(bytes), "size": size, "pointerSize": 130}}),
            }
        };
        let siblings: Vec<_> = self.files.iter().map(sibling).collect();
        serde_json::json!({"id": self.id, "sha": self.commit, "siblings": siblings}).to_string()
    }

    /// The hub's answer, if it is asked for this repository. Large files are redirected to `store`.
    pub fn reply(&self, request: &Request, store: &str) -> Option<Reply> {
        let api = format!("/api/{}/{}/revision/", self.kind, self.id);
        if let Some(revision) = request.path.strip_prefix(&api) {
            let revision = revision.split('?').next().unwrap();
            let known = revision == "main" || revision == self.commit;
            return Some(if known { Reply::new(200, self.listing()) } else { Reply::new(404, "") });
        }
        let prefix = if self.kind == "datasets" { "/datasets/" } else { "/" };
        let name = request.path.strip_prefix(&format!("{prefix}{}/resolve/{}/", self.id, self.commit))?;
        let (_, bytes, large) = self.files.iter().find(|(known, ..)| known == name)?;
        Some(if *large {
            Reply::new(302, "")
                .with("location", format!("{store}/store/{}?signature=planted-signature", sha256(bytes)))
                .with("x-linked-etag", format!("\"{}\"", sha256(bytes)))
                .with("x-linked-size", bytes.len().to_string())
        } else {
            file_reply(request, bytes, &git_blob(bytes))
        })
    }

    /// The store's answer.
    pub fn stored(&self, request: &Request) -> Reply {
        let found = self.files.iter().find(|(_, bytes, large)| *large && request.path.contains(&sha256(bytes)));
        found.map_or_else(|| Reply::new(404, ""), |(_, bytes, _)| file_reply(request, bytes, "store-tag"))
    }
}

/// A hub and its store, whose answers `spoil` may change.
pub struct Hub {
    pub hub: Server,
    pub store: Server,
}

impl Hub {
    pub fn new(contents: Vec<Content>) -> Self {
        Self::spoilt(contents, |_, reply| reply)
    }

    /// `spoil` gets every answer that the store would give.
    pub fn spoilt(contents: Vec<Content>, spoil: impl Fn(&Request, Reply) -> Reply + Send + Sync + 'static) -> Self {
        let stored = contents.clone();
        let store = Server::start(move |request| {
            let replies = stored.iter().map(|content| content.stored(request));
            spoil(request, replies.into_iter().find(|r| r.status != 404).unwrap_or_else(|| Reply::new(404, "")))
        });
        let url = store.url();
        let hub = Server::start(move |request| {
            let reply = contents.iter().find_map(|content| content.reply(request, &url));
            reply.unwrap_or_else(|| Reply::new(404, ""))
        });
        Self { hub, store }
    }
}
