//! Reads the source tree the way the tidy tests want it: every Rust file of the workspace with its
//! path and text, and every crate with its workspace dependencies. No rule lives here; the rules are
//! the tests in `tests/tidy.rs`.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// One Rust source file.
#[derive(Debug)]
pub struct Source {
    /// Path below the repository root, with `/`.
    pub path: String,
    /// Its text.
    pub text: String,
}

impl Source {
    /// Whether the file holds only tests: it lies in a `tests` folder of a crate, is called `tests.rs`,
    /// or belongs to one of the crates that exist for testing.
    pub fn is_test(&self) -> bool {
        self.path.starts_with("tests/")
            || self.path.contains("/tests/")
            || self.path.ends_with("/tests.rs")
            || self.path.contains("/benches/")
    }

    /// Lines before the first `#[cfg(test)]` module: what a reader has to understand.
    pub fn product_lines(&self) -> usize {
        self.text.lines().take_while(|line| line.trim() != "#[cfg(test)]").count()
    }

    /// Numbered lines without comments.
    pub fn code_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text
            .lines()
            .enumerate()
            .map(|(index, line)| (index + 1, line))
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
    }
}

/// The repository root, found from this crate's own place.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_path_buf()
}

/// All Rust files below the root, build output and caches left out, sorted by path.
///
/// # Errors
/// Whatever reading the tree gives.
pub fn sources() -> io::Result<Vec<Source>> {
    let root = root();
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with('.') || name == "target" {
                continue;
            }
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                folders.push(path);
            } else if name.ends_with(".rs") {
                let text = fs::read_to_string(&path)?;
                let path = path.strip_prefix(&root).unwrap_or(&path).to_string_lossy().into_owned();
                found.push(Source { path, text });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// A crate of the workspace.
#[derive(Debug)]
pub struct Crate {
    /// Package name.
    pub name: String,
    /// Folder below the root.
    pub folder: String,
    /// Names of all dependencies, development ones too.
    pub dependencies: Vec<String>,
    /// Names of the dependencies that ship in the product.
    pub shipped: Vec<String>,
}

/// All crates of the workspace by package name.
///
/// # Errors
/// A manifest that cannot be read or has no package.
pub fn crates() -> io::Result<BTreeMap<String, Crate>> {
    let root = root();
    let manifest = read_manifest(&root.join("Cargo.toml"))?;
    let members = manifest
        .get("workspace")
        .and_then(|workspace| workspace.get("members"))
        .and_then(toml::Value::as_array)
        .cloned()
        .unwrap_or_default();
    let mut all = BTreeMap::new();
    for member in members.iter().filter_map(toml::Value::as_str) {
        let manifest = read_manifest(&root.join(member).join("Cargo.toml"))?;
        let name = manifest
            .get("package")
            .and_then(|package| package.get("name"))
            .and_then(toml::Value::as_str)
            .ok_or_else(|| io::Error::other(format!("{member}/Cargo.toml names no package")))?
            .to_owned();
        let shipped = dependency_names(&manifest, "dependencies");
        let mut dependencies = shipped.clone();
        dependencies.extend(dependency_names(&manifest, "dev-dependencies"));
        dependencies.extend(dependency_names(&manifest, "build-dependencies"));
        all.insert(name.clone(), Crate { name, folder: member.to_owned(), dependencies, shipped });
    }
    Ok(all)
}

fn read_manifest(path: &Path) -> io::Result<toml::Table> {
    fs::read_to_string(path)?
        .parse()
        .map_err(|error| io::Error::other(format!("{}: {error}", path.display())))
}

fn dependency_names(manifest: &toml::Table, section: &str) -> Vec<String> {
    manifest
        .get(section)
        .and_then(toml::Value::as_table)
        .map(|table| table.keys().cloned().collect())
        .unwrap_or_default()
}
