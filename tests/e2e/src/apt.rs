//! Debian packages, fetched and unpacked without installing them.
//!
//! apt runs on a configuration of its own (source list, state, package cache, an empty list of installed
//! packages), so the machine's apt is neither changed nor locked. Mirrors and the signing key come from the
//! machine's own sources; apt checks signatures and checksums as always. Packages already fetched are kept.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The Debian release that the emulated DPU runs.
pub const RELEASE: &str = "bookworm";

/// The keyring of Debian, used where the machine's sources name none.
const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Overrides the mirror (a URL), for machines without Debian sources.
const MIRROR_VARIABLE: &str = "DPU_E2E_DEBIAN_MIRROR";

/// One apt source as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    uri: String,
    suites: Vec<String>,
    signed_by: Option<String>,
}

/// A private apt.
#[derive(Debug)]
pub struct Apt {
    home: PathBuf,
}

impl Apt {
    /// Sets up apt below `home` and fetches the package lists unless they are there from an earlier run.
    ///
    /// # Errors
    /// When there is no usable Debian source or the lists cannot be fetched.
    pub fn open(home: &Path) -> Result<Self> {
        let apt = Self { home: home.to_owned() };
        for directory in ["lists/partial", "archives/partial"] {
            let path = home.join(directory);
            fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        apt.write("status", "")?;
        let complete = home.join("lists/complete");
        if !complete.is_file() {
            let sources = debian_sources(&machine_sources()?, std::env::var(MIRROR_VARIABLE).ok())?;
            apt.write("debian.sources", &sources)?;
            apt.run("apt-get", &["update"])?;
            apt.write("lists/complete", "")?;
        }
        Ok(apt)
    }

    /// The versions of a package that are on offer, with the packages they depend on.
    ///
    /// # Errors
    /// When apt fails or knows no such package.
    pub fn versions(&self, package: &str) -> Result<Vec<(String, String)>> {
        let text = self.run("apt-cache", &["show", package])?;
        let mut versions = Vec::new();
        for stanza in text.split("\n\n") {
            let field = |name: &str| {
                stanza.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
            };
            if let Some(version) = field("Version:") {
                versions.push((version, field("Depends:").unwrap_or_default()));
            }
        }
        Ok(versions)
    }

    /// Fetches exactly these packages (names, or `name=version`) and returns the files.
    ///
    /// # Errors
    /// When apt fails.
    pub fn fetch(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        let uris = self.run("apt-get", &[&["--print-uris", "download"], packages].concat())?;
        self.fetch_listed(&uris, &[&["download"], packages].concat())
    }

    /// Fetches these packages with all they depend on (recommended ones not included).
    ///
    /// # Errors
    /// When apt fails.
    pub fn fetch_with_dependencies(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        let options = ["--yes", "--no-install-recommends"];
        let uris = self.run("apt-get", &[&options[..], &["--print-uris", "install"], packages].concat())?;
        self.fetch_listed(&uris, &[&options[..], &["--download-only", "install"], packages].concat())
    }

    /// Runs the fetching command unless all files of the list are there, then returns them.
    fn fetch_listed(&self, uris: &str, command: &[&str]) -> Result<Vec<PathBuf>> {
        let archives = self.home.join("archives");
        let files: Vec<PathBuf> = file_names(uris).iter().map(|name| archives.join(name)).collect();
        if files.is_empty() {
            bail!("apt names no file to fetch for {}", command.join(" "));
        }
        if !files.iter().all(|file| file.is_file()) {
            self.run("apt-get", command)?;
        }
        if let Some(missing) = files.iter().find(|file| !file.is_file()) {
            bail!("apt did not fetch {}", missing.display());
        }
        Ok(files)
    }

    fn write(&self, name: &str, content: &str) -> Result<()> {
        let path = self.home.join(name);
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let home = self.home.display();
        let mut command = Command::new(program);
        for option in [
            format!("Dir::Etc::sourcelist={home}/debian.sources"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            "Dir::Etc::preferences=/dev/null".to_owned(),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            format!("Dir::State={home}"),
            format!("Dir::State::status={home}/status"),
            format!("Dir::Cache={home}"),
            format!("Dir::Cache::archives={home}/archives"),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
            "APT::Install-Suggests=0".to_owned(),
            "Debug::NoLocking=1".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command.args(arguments).current_dir(self.home.join("archives")).env("LC_ALL", "C");
        run_tool(&mut command)
    }
}

/// Runs a program to its end and returns what it printed.
///
/// # Errors
/// When it cannot be started or fails; then with what it wrote to its error output.
pub fn run_tool(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| {
        format!("cannot run {name}: run `tests/setup packages` to install what is needed")
    })?;
    if !output.status.success() {
        let arguments: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy()).collect();
        bail!(
            "{name} {} failed ({}): {}",
            arguments.join(" "),
            crate::registry::describe_exit(output.status),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Unpacks a package into a directory.
///
/// # Errors
/// When dpkg-deb fails.
pub fn unpack(package: &Path, directory: &Path) -> Result<()> {
    run_tool(Command::new("dpkg-deb").arg("-x").arg(package).arg(directory)).map(drop)
}

/// The file names in the output of `--print-uris`: lines of `'uri' name size hash`.
fn file_names(uris: &str) -> Vec<String> {
    uris.lines()
        .filter(|line| line.starts_with('\''))
        .filter_map(|line| line.split_whitespace().nth(1))
        .map(str::to_owned)
        .collect()
}

fn machine_sources() -> Result<Vec<Source>> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    let mut sources = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(one_line_sources(&text)),
            Some("sources") => sources.extend(deb822_sources(&text)),
            _ => {}
        }
    }
    Ok(sources)
}

/// The one-line format of sources.list(5): `deb [option=value ...] uri suite component...`.
fn one_line_sources(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for line in text.lines() {
        let Some(rest) = line.trim().strip_prefix("deb ") else { continue };
        let rest = rest.trim();
        let (options, rest) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((options, rest)) => (options, rest),
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        if let (Some(uri), Some(suite)) = (words.next(), words.next()) {
            let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
            sources.push(Source {
                uri: uri.to_owned(),
                suites: vec![suite.to_owned()],
                signed_by: signed_by.map(str::to_owned),
            });
        }
    }
    sources
}

/// The deb822 format of sources.list(5): stanzas of `Field: value`. A key written out in place of a file name
/// is of no use here and left out.
fn deb822_sources(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for stanza in text.split("\n\n") {
        let fields: BTreeMap<String, &str> = stanza
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.trim().to_ascii_lowercase(), value.trim()))
            .collect();
        let words = |name: &str| fields.get(name).map(|value| value.split_whitespace().map(str::to_owned));
        let enabled = fields.get("enabled").is_none_or(|value| *value != "no");
        let binary = words("types").is_some_and(|mut types| types.any(|kind| kind == "deb"));
        if let (true, true, Some(uris), Some(suites)) = (enabled, binary, words("uris"), words("suites")) {
            let suites: Vec<String> = suites.collect();
            let signed_by =
                fields.get("signed-by").filter(|path| path.starts_with('/')).map(|path| (*path).to_owned());
            sources.extend(uris.map(|uri| Source {
                uri,
                suites: suites.clone(),
                signed_by: signed_by.clone(),
            }));
        }
    }
    sources
}

/// The source file of the private apt: the release, its updates, its backports and its security updates.
fn debian_sources(machine: &[Source], mirror: Option<String>) -> Result<String> {
    let main = match mirror {
        Some(uri) => Source { uri, suites: Vec::new(), signed_by: None },
        None => match machine.iter().find(|source| source.suites.iter().any(|suite| suite == RELEASE)) {
            Some(source) => source.clone(),
            None => bail!(
                "the apt sources of this machine have no Debian {RELEASE}: set {MIRROR_VARIABLE} to the URL of a Debian mirror"
            ),
        },
    };
    let security_suite = format!("{RELEASE}-security");
    let security = machine.iter().find(|source| source.suites.contains(&security_suite));
    let mut text = stanza(&main, &format!("{RELEASE} {RELEASE}-updates {RELEASE}-backports"));
    if let Some(source) = security {
        text.push('\n');
        text.push_str(&stanza(source, &security_suite));
    }
    Ok(text)
}

fn stanza(source: &Source, suites: &str) -> String {
    let default_key = Path::new(DEBIAN_KEYRING).is_file().then(|| DEBIAN_KEYRING.to_owned());
    let key = source.signed_by.clone().or(default_key);
    let signed_by = key.map(|key| format!("Signed-By: {key}\n")).unwrap_or_default();
    format!("Types: deb\nURIs: {}\nSuites: {suites}\nComponents: main\n{signed_by}", source.uri)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_source_formats_are_read() {
        let old = "# x\ndeb [arch=amd64 signed-by=/k.gpg] http://mirror/debian bookworm main\ndeb-src http://m/d s main\n";
        assert_eq!(
            one_line_sources(old),
            [Source {
                uri: "http://mirror/debian".to_owned(),
                suites: vec!["bookworm".to_owned()],
                signed_by: Some("/k.gpg".to_owned()),
            }]
        );
        let new = "Types: deb\n# note: x\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\nComponents: main\n\n\
                   Types: deb\nEnabled: no\nURIs: http://off/\nSuites: bookworm\n";
        let sources = deb822_sources(new);
        assert_eq!(sources.len(), 1);
        assert_eq!(sources[0].suites, ["bookworm", "bookworm-updates"]);
    }

    #[test]
    fn the_private_source_adds_backports_and_keeps_security() {
        let machine = deb822_sources(
            "Types: deb\nURIs: http://m/debian\nSuites: bookworm\nSigned-By: /k.gpg\n\n\
             Types: deb\nURIs: http://m/security\nSuites: bookworm-security\nSigned-By: /k.gpg\n",
        );
        let text = debian_sources(&machine, None).unwrap();
        assert!(
            text.contains("URIs: http://m/debian\nSuites: bookworm bookworm-updates bookworm-backports\n")
        );
        assert!(text.contains("URIs: http://m/security\nSuites: bookworm-security\n"));
        assert!(text.contains("Signed-By: /k.gpg"));
    }

    #[test]
    fn a_machine_without_debian_is_told_what_to_set() {
        let error = debian_sources(&[], None).unwrap_err().to_string();
        assert!(error.contains(MIRROR_VARIABLE), "{error}");
    }

    #[test]
    fn file_names_come_from_the_second_column() {
        let uris = "Reading...\n'http://m/pool/a%3a1.deb' a_1%3a1_amd64.deb 12 SHA256:00\n";
        assert_eq!(file_names(uris), ["a_1%3a1_amd64.deb"]);
    }
}
