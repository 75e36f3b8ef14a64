//! The cache of fetched and built artefacts: `<repository>/.cache/e2e`.
//!
//! Safe to delete at any time. One program fills it at a time (`flock` on `lock`); every artefact is made under
//! a temporary name and renamed when complete, so that an interrupted run leaves nothing half made, and the
//! next run continues with what is already there.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};

/// Overrides the place of the cache.
const CACHE_VARIABLE: &str = "DPU_E2E_CACHE";

/// The cache directory.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Finds the cache and makes sure that its directory exists.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open() -> Result<Self> {
        let root = match std::env::var_os(CACHE_VARIABLE) {
            Some(path) => PathBuf::from(path),
            None => repository().join(".cache/e2e"),
        };
        fs::create_dir_all(&root).with_context(|| format!("cannot create the cache {}", root.display()))?;
        let root = root.canonicalize().with_context(|| format!("cannot resolve {}", root.display()))?;
        Ok(Self { root })
    }

    /// A path in the cache.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The directory `name`, made by `build` if it is not there yet. `build` gets an empty directory to fill.
    ///
    /// # Errors
    /// When `build` fails or the directory cannot be put in place.
    pub fn directory(&self, name: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let place = self.root.join(name);
        if place.is_dir() {
            return Ok(place);
        }
        let _lock = self.lock()?;
        if place.is_dir() {
            return Ok(place);
        }
        let draft = self.root.join(format!("{name}.partial"));
        if let Some(parent) = draft.parent() {
            fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        }
        match fs::remove_dir_all(&draft) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", draft.display()));
            }
            _ => {}
        }
        fs::create_dir(&draft).with_context(|| format!("cannot create {}", draft.display()))?;
        build(&draft)?;
        fs::rename(&draft, &place)
            .with_context(|| format!("cannot rename {} to {}", draft.display(), place.display()))?;
        Ok(place)
    }

    fn lock(&self) -> Result<File> {
        let path = self.root.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(file)
    }
}

/// The repository: the nearest directory above the working directory or the program that holds this crate, or
/// the place where the program was built.
fn repository() -> PathBuf {
    let starts = [std::env::current_dir(), std::env::current_exe()];
    starts
        .iter()
        .flatten()
        .flat_map(|start| start.ancestors())
        .find(|directory| directory.join("tests/e2e/Cargo.toml").is_file())
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."), Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_build_leaves_nothing_and_a_later_one_succeeds() {
        let place = tempfile::tempdir().unwrap();
        let cache = Cache { root: place.path().to_owned() };
        let failed = cache.directory("kernel/x", |draft| {
            fs::write(draft.join("half"), "half").unwrap();
            anyhow::bail!("no network")
        });
        assert!(failed.is_err());
        assert!(!place.path().join("kernel/x").exists());
        let made = cache
            .directory("kernel/x", |draft| {
                assert!(!draft.join("half").exists());
                fs::write(draft.join("whole"), "whole").map_err(Into::into)
            })
            .unwrap();
        assert_eq!(fs::read_to_string(made.join("whole")).unwrap(), "whole");
        cache.directory("kernel/x", |_| anyhow::bail!("must not be built twice")).unwrap();
    }
}
