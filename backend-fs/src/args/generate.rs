//! The man page and the shell completions, made from the same definition as the parser.
#![forbid(unsafe_code)]

use std::io;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::Roff;

use super::values::Generate;
use super::{AFTER_LONG_HELP, Args};

/// The text asked for.
pub fn text(what: Generate) -> Vec<u8> {
    let mut command = Args::command();
    let mut text = Vec::new();
    match what {
        Generate::Man => {
            // Writing to memory cannot fail.
            let _ = man_page(command, &mut text);
        }
        Generate::Bash => complete(Shell::Bash, &mut command, &mut text),
        Generate::Zsh => complete(Shell::Zsh, &mut command, &mut text),
        Generate::Fish => complete(Shell::Fish, &mut command, &mut text),
    }
    text
}

fn complete(shell: Shell, command: &mut Command, text: &mut Vec<u8>) {
    clap_complete::generate(shell, command, "backend-fs", text);
}

/// The options as clap_mangen sets them; what follows them in the help as sections of their own, with
/// its line breaks kept.
fn man_page(command: Command, text: &mut Vec<u8>) -> io::Result<()> {
    let man = Man::new(command);
    man.render_title(text)?;
    man.render_name_section(text)?;
    man.render_synopsis_section(text)?;
    man.render_description_section(text)?;
    man.render_options_section(text)?;
    for section in AFTER_LONG_HELP.split("\n\n").fold(Vec::new(), joined) {
        let (title, body) = section.split_once(":\n").unwrap_or(("notes", &section));
        let mut roff = Roff::new();
        roff.control("SH", [title.to_uppercase().as_str()]);
        roff.control("nf", []);
        for line in body.lines() {
            roff.text([line.strip_prefix("  ").unwrap_or(line).into()]);
        }
        roff.control("fi", []);
        roff.to_writer(text)?;
    }
    Ok(())
}

/// Joins paragraphs to sections: one starts where a line is not indented.
fn joined(mut sections: Vec<String>, paragraph: &str) -> Vec<String> {
    match sections.last_mut() {
        Some(last) if paragraph.starts_with(' ') => {
            last.push_str("\n\n");
            last.push_str(paragraph);
        }
        _ => sections.push(paragraph.to_owned()),
    }
    sections
}
