//! From a name to a folder: what the cache lacks is fetched.

use std::fs;
use std::path::PathBuf;

use crate::cache::{Claim, Store};
use crate::client::{ASKED_AGAIN, Client};
use crate::download::{Download, Step};
use crate::error::{HubError, Result};
use crate::listing::{Known, Listing, RemoteFile};
use crate::repo::{Repo, RepoKind};
use crate::settings::Settings;

/// When the hub is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// Only for what the cache lacks: a branch means the commit that it meant when it was fetched.
    Cached,
    /// Where a branch stands now.
    Newest,
}

/// What is told on the way.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A download begins.
    Start {
        /// The repository in words.
        what: &'a str,
        /// Its commit.
        commit: &'a str,
        /// The files that are lacking.
        files: usize,
        /// Their bytes.
        bytes: u64,
        /// Those of them that are here already, from a download that was cut.
        kept: u64,
    },
    /// So many bytes of those are here.
    Progress {
        /// Here.
        done: u64,
        /// Of so many.
        of: u64,
    },
    /// Another process downloads the same file.
    Waiting {
        /// The file.
        file: &'a str,
    },
    /// A file was cut and is gone on with.
    Again {
        /// The file.
        file: &'a str,
        /// Why.
        reason: String,
    },
    /// The hub could not say what is new; what the cache has is used.
    Unasked {
        /// The repository in words.
        what: &'a str,
        /// Why.
        reason: String,
    },
}

/// A repository's files on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The snapshot's folder.
    pub folder: PathBuf,
    /// The commit that it is of.
    pub commit: String,
    /// The files that were downloaded; 0 when the cache had them all.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// Sees to it that the files that `select` takes from the names of all are in the cache, and says where.
///
/// # Errors
/// What is not there and cannot be had, each with the reason; see [`HubError`].
pub fn fetch(
    repo: &Repo,
    select: &dyn Fn(&[&str]) -> Vec<String>,
    freshness: Freshness,
    settings: &Settings,
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<Fetched> {
    let store = Store::new(&settings.cache, repo);
    let work = Work { repo, what: repo.to_string(), store, select, settings };
    work.run(freshness, tell)
}

struct Work<'a> {
    repo: &'a Repo,
    what: String,
    store: Store,
    select: &'a dyn Fn(&[&str]) -> Vec<String>,
    settings: &'a Settings,
}

impl Work<'_> {
    fn run(&self, freshness: Freshness, tell: &mut dyn FnMut(Event<'_>)) -> Result<Fetched> {
        let cached = self.store.commit(self.repo.revision());
        let kept = cached.as_deref().and_then(|commit| self.store.listing(commit));
        // A commit does not change, so that there is nothing newer than it.
        let settled = freshness == Freshness::Cached || cached.as_deref() == Some(self.repo.revision());
        if let Some(listing) = &kept
            && settled
            && self.lacking(listing)?.is_empty()
        {
            return Ok(self.found(&listing.commit));
        }
        if self.settings.offline {
            return self.what_there_is(cached, kept, None);
        }
        let client = Client::new(self.settings)?;
        let revision = cached.clone().filter(|_| settled).unwrap_or_else(|| self.repo.revision().to_owned());
        // Where there is something to fall back on, nobody waits long.
        let in_hand = cached.as_deref().is_some_and(|commit| self.store.snapshot(commit).is_dir());
        let retries = if in_hand { 0 } else { ASKED_AGAIN };
        let mut listing = match kept {
            Some(listing) if settled => listing,
            kept => match client.listing(self.repo, &revision, retries) {
                Ok(listing) => listing,
                // A hub that lists such names is not one to fall back from quietly.
                Err(error @ HubError::FileName { .. }) => return Err(error),
                Err(error) => {
                    let reason = error.to_string();
                    let found = self.what_there_is(cached, kept, Some(error))?;
                    tell(Event::Unasked { what: &self.what, reason });
                    return Ok(found);
                }
            },
        };
        let lacking = self.known(&client, &mut listing)?;
        self.download(&client, &listing, lacking, tell)
    }

    /// What the cache has, when nobody can be asked: because of `cause`, or because nobody should be.
    fn what_there_is(
        &self,
        commit: Option<String>,
        listing: Option<Listing>,
        cause: Option<HubError>,
    ) -> Result<Fetched> {
        // What the hub said itself goes before what the cache lacks.
        let (reason, offline) = match cause {
            None => ("offline work is asked for (HF_HUB_OFFLINE)".to_owned(), true),
            Some(HubError::Unreachable { ref host, ref reason, .. }) => {
                (format!("{host} was not reached ({reason})"), false)
            }
            Some(_) => (String::new(), false),
        };
        let cause = cause.filter(|_| reason.is_empty());
        let reason = format!("{reason}; fetch it where there is a network with `{}`", self.repo.command());
        let Some(commit) = commit.filter(|commit| self.store.snapshot(commit).is_dir()) else {
            let (what, cache) = (self.what.clone(), self.settings.cache.clone());
            return Err(cause.unwrap_or(HubError::NotCached { what, cache, reason, offline }));
        };
        if let Some(listing) = listing
            && let Some(first) = self.lacking(&listing)?.first()
        {
            let (what, folder, missing) = (self.what.clone(), self.store.snapshot(&commit), first.path.clone());
            return Err(cause.unwrap_or(HubError::Incomplete { what, folder, missing, reason, offline }));
        }
        Ok(self.found(&commit))
    }

    fn found(&self, commit: &str) -> Fetched {
        Fetched { folder: self.store.snapshot(commit), commit: commit.to_owned(), files: 0, bytes: 0 }
    }

    /// The places in the listing of what is wanted.
    fn wanted(&self, listing: &Listing) -> Result<Vec<usize>> {
        let names: Vec<&str> = listing.files.iter().map(|file| file.path.as_str()).collect();
        let wanted = (self.select)(&names);
        if wanted.is_empty() {
            let mut has = names.iter().take(5).copied().collect::<Vec<_>>().join(", ");
            if names.len() > 5 {
                has += &format!(" and {} more", names.len() - 5);
            }
            let remedy = match self.repo.kind() {
                RepoKind::Model => "weights are read from safetensors files only",
                RepoKind::Dataset => "name its files, as hf://OWNER/NAME/data/*.parquet, or another split",
            };
            return Err(HubError::NothingWanted { what: self.what.clone(), has, remedy });
        }
        Ok((0..names.len()).filter(|i| wanted.iter().any(|name| name == names[*i])).collect())
    }

    /// The wanted files that the cache has not.
    fn lacking(&self, listing: &Listing) -> Result<Vec<RemoteFile>> {
        let mut lacking = Vec::new();
        for i in self.wanted(listing)? {
            if !self.store.has(&listing.commit, &listing.files[i])? {
                lacking.push(listing.files[i].clone());
            }
        }
        Ok(lacking)
    }

    /// The wanted files that the cache has not, with size and digest.
    fn known(&self, client: &Client<'_>, listing: &mut Listing) -> Result<Vec<(String, Known)>> {
        let mut lacking = Vec::new();
        for i in self.wanted(listing)? {
            let file = &mut listing.files[i];
            let known = match file.known.clone() {
                Some(known) => known,
                None => client.known(self.repo, &listing.commit, &file.path)?,
            };
            file.known = Some(known.clone());
            if !self.store.has(&listing.commit, file)? {
                lacking.push((file.path.clone(), known));
            }
        }
        Ok(lacking)
    }

    fn download(
        &self,
        client: &Client<'_>,
        listing: &Listing,
        lacking: Vec<(String, Known)>,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<Fetched> {
        let store = &self.store;
        store.create()?;
        store.drop_stale();
        // A hub may say any number.
        let bytes = lacking.iter().fold(0u64, |sum, (_, known)| sum.saturating_add(known.size));
        if !lacking.is_empty() {
            let kept = lacking.iter().map(|(_, known)| self.here(known)).sum();
            self.check_space(bytes - kept)?;
            tell(Event::Start { what: &self.what, commit: &listing.commit, files: lacking.len(), bytes, kept });
        }
        let mut before = 0;
        for (path, known) in &lacking {
            self.file(client, listing, path, known, &mut |event| match event {
                Event::Progress { done, .. } => tell(Event::Progress { done: before + done, of: bytes }),
                event => tell(event),
            })?;
            before = known.size.saturating_add(before);
            tell(Event::Progress { done: before, of: bytes });
        }
        store.keep_listing(listing)?;
        // Last, so that a branch never means a snapshot that was not fetched to its end.
        store.set_ref(self.repo.revision(), &listing.commit)?;
        Ok(Fetched { files: lacking.len(), bytes, ..self.found(&listing.commit) })
    }

    /// How much of a file is here, whole or begun.
    fn here(&self, known: &Known) -> u64 {
        let length = |path: PathBuf| fs::metadata(path).map_or(0, |m| m.len());
        let blob = length(self.store.blob(&known.digest));
        if blob == known.size {
            return blob;
        }
        let begun = length(self.store.blob(&known.digest).with_extension("incomplete"));
        if begun <= known.size { begun } else { 0 }
    }

    fn check_space(&self, needed: u64) -> Result<()> {
        let folder = self.store.folder();
        let free = fs4::available_space(folder).map_err(HubError::io("ask for the free space of", folder))?;
        if free < needed {
            return Err(HubError::NoSpace { what: self.what.clone(), folder: folder.to_owned(), needed, free });
        }
        Ok(())
    }

    /// Fetches one file, unless someone has done so meanwhile, and puts it into the snapshot.
    fn file(
        &self,
        client: &Client<'_>,
        listing: &Listing,
        path: &str,
        known: &Known,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<()> {
        let claim: Claim = self.store.claim(&known.digest, &mut || tell(Event::Waiting { file: path }))?;
        let there = fs::metadata(self.store.blob(&known.digest)).is_ok_and(|m| m.len() == known.size);
        if !there {
            let partial = self.store.partial(&known.digest, &claim);
            let address = self.repo.file(&listing.commit, path);
            let download = Download { client, what: &self.what, file: path, address, known, partial: &partial };
            download.run(&mut |step| match step {
                Step::At(done) => tell(Event::Progress { done, of: known.size }),
                Step::Again(reason) => tell(Event::Again { file: path, reason }),
            })?;
            self.store.keep_blob(&partial, &known.digest)?;
        }
        self.store.link(&listing.commit, path, &known.digest)
    }
}
