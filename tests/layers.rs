//! The layers of the library: a module imports from its own layer and from those below it, never from one above.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The modules of `src/lib.rs` from top to bottom, as its doc comment lists them.
const LAYERS: [&str; 24] = [
    "cli", "pipeline", "config", "report", "shrink", "check", "measure", "train", "io", "networks", "data", "engine",
    "model", "graph", "ops", "device", "tensor", "shape", "index", "dtype", "memory", "files", "error", "terminal",
];

/// Where a layer stands in [`LAYERS`], 0 being the top.
fn rank(layer: &str) -> Option<usize> {
    LAYERS.iter().position(|l| *l == layer)
}

/// A use of one layer in a source file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Import {
    line: usize,
    layer: String,
}

/// The source with comments, strings and characters blanked, so that only code is left; lines stay where they are.
fn code_of(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes[at..].starts_with(b"//") => end_of_line(bytes, at),
            b'/' if bytes[at..].starts_with(b"/*") => end_of_comment(bytes, at),
            b'"' => end_of_string(bytes, at),
            b'r' if is_raw_string(bytes, at) => end_of_raw_string(bytes, at),
            b'\'' => end_of_character(bytes, at),
            _ => at,
        };
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end.max(at + 1);
    }
    String::from_utf8(out).expect("blanking whole tokens leaves valid text")
}

fn end_of_line(bytes: &[u8], at: usize) -> usize {
    bytes[at..].iter().position(|b| *b == b'\n').map_or(bytes.len(), |n| at + n)
}

fn end_of_comment(bytes: &[u8], at: usize) -> usize {
    let (mut depth, mut i) = (0, at);
    while i + 1 < bytes.len() {
        match &bytes[i..i + 2] {
            b"/*" => (depth, i) = (depth + 1, i + 2),
            b"*/" if depth == 1 => return i + 2,
            b"*/" => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
    }
    bytes.len()
}

fn end_of_string(bytes: &[u8], at: usize) -> usize {
    let mut i = at + 1;
    while i < bytes.len() && bytes[i] != b'"' {
        i += if bytes[i] == b'\\' { 2 } else { 1 };
    }
    (i + 1).min(bytes.len())
}

/// Whether an `r` begins a raw string, and is not the end of a name.
fn is_raw_string(bytes: &[u8], at: usize) -> bool {
    let continues_name =
        at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_') && bytes[at - 1] != b'b';
    let hashes = bytes[at + 1..].iter().take_while(|b| **b == b'#').count();
    !continues_name && bytes.get(at + 1 + hashes) == Some(&b'"')
}

fn end_of_raw_string(bytes: &[u8], at: usize) -> usize {
    let hashes = bytes[at + 1..].iter().take_while(|b| **b == b'#').count();
    let close = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
    let start = at + hashes + 2;
    bytes[start..].windows(close.len()).position(|w| w == close).map_or(bytes.len(), |n| start + n + close.len())
}

/// The end of a character literal; a lifetime, which is none, ends where it begins.
fn end_of_character(bytes: &[u8], at: usize) -> usize {
    let text = std::str::from_utf8(&bytes[at + 1..]).expect("source is UTF-8");
    match text.chars().next() {
        Some('\\') => text[2..].find('\'').map_or(at, |n| at + 1 + 2 + n + 1),
        Some(c) if text[c.len_utf8()..].starts_with('\'') => at + 1 + c.len_utf8() + 1,
        _ => at,
    }
}

/// The first segments of what follows `crate::`, or that many `super::` as leave the file's module: one name, or a group.
fn first_segments(rest: &str) -> Vec<&str> {
    let name = |text: &str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let rest = rest.trim_start();
    let Some(group) = rest.strip_prefix('{') else {
        return vec![&rest[..name(rest)]];
    };
    let (mut depth, mut begins, mut found) = (0, true, Vec::new());
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => begins = true,
            c if begins && (c.is_alphanumeric() || c == '_') => {
                found.push(&group[i..i + name(&group[i..])]);
                begins = false;
            }
            _ => {}
        }
    }
    found
}

/// Every layer that a source file names by a path from the crate's root. `depth` is how many modules lie between the
/// file and that root, itself included: `super` so often leads there too.
fn imports(source: &str, depth: usize) -> BTreeSet<Import> {
    let code = code_of(source);
    let roots = ["crate::".to_owned(), "super::".repeat(depth)];
    let mut found = BTreeSet::new();
    for root in &roots {
        for (at, _) in code.match_indices(root.as_str()) {
            let line = code[..at].matches('\n').count() + 1;
            for segment in first_segments(&code[at + root.len()..]) {
                // The root re-exports what everything needs.
                let layer = if matches!(segment, "Error" | "Result") { "error" } else { segment };
                if rank(layer).is_some() || root == "crate::" {
                    found.insert(Import { line, layer: layer.to_owned() });
                }
            }
        }
    }
    found
}

/// What a file of `layer` imports from above, or from no layer at all.
fn violations(layer: &str, source: &str, depth: usize) -> Vec<Import> {
    let own = rank(layer).expect("the file's layer is listed");
    imports(source, depth).into_iter().filter(|import| rank(&import.layer).is_none_or(|r| r < own)).collect()
}

fn source_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Every source file but the two roots, with its layer and its depth.
fn sources(folder: &Path, into: &mut Vec<(PathBuf, String, usize)>) {
    for entry in fs::read_dir(folder).expect("src/ can be read") {
        let path = entry.expect("src/ can be read").path();
        if path.is_dir() {
            sources(&path, into);
            continue;
        }
        let inside = path.strip_prefix(source_root()).expect("below src/");
        let is_root = ["lib.rs", "main.rs"].iter().any(|root| inside == Path::new(root));
        if path.extension().is_none_or(|e| e != "rs") || is_root {
            continue;
        }
        let modules: Vec<_> = inside.with_extension("").iter().map(|m| m.to_string_lossy().into_owned()).collect();
        let depth = modules.len() - usize::from(modules.last().is_some_and(|m| m == "mod"));
        into.push((path, modules[0].clone(), depth));
    }
}

#[test]
fn no_module_imports_from_a_layer_above_it() {
    let mut files = Vec::new();
    sources(&source_root(), &mut files);
    assert!(files.len() > 100, "only {} source files found", files.len());
    let mut wrong = Vec::new();
    for (path, layer, depth) in files {
        let source = fs::read_to_string(&path).expect("source can be read");
        for Import { line, layer: upper } in violations(&layer, &source, depth) {
            wrong.push(format!("{}:{line}: {layer} must not import {upper}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "imports point up:\n{}", wrong.join("\n"));
}

#[test]
fn the_library_lists_the_same_layers_in_the_same_order() {
    let library = fs::read_to_string(source_root().join("lib.rs")).expect("lib.rs can be read");
    let mut modules: Vec<&str> =
        library.lines().filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let mut listed = LAYERS;
    modules.sort_unstable();
    listed.sort_unstable();
    assert_eq!(modules, listed, "LAYERS and the modules of lib.rs differ");

    let doc: String = library.lines().filter_map(|l| l.strip_prefix("//!")).collect();
    let documented: Vec<&str> = doc.split("[`").skip(1).filter_map(|link| link.split("`]").next()).collect();
    assert_eq!(documented, LAYERS, "the doc comment of lib.rs lists other layers");
}

#[test]
fn an_upward_import_is_found_however_it_is_written() {
    let layers = |source: &str, depth| -> Vec<String> {
        violations("ops", source, depth).into_iter().map(|import| import.layer).collect()
    };
    assert_eq!(layers("use crate::engine::Plan;", 2), ["engine"]);
    assert_eq!(layers("use crate::{Error, device::{View, gpu::Gpu}, graph::Op};", 2), ["graph"]);
    assert_eq!(layers("use crate::{\n    dtype::Dtype,\n    measure::{self, Timer},\n};", 2), ["measure"]);
    assert_eq!(layers("fn f() -> crate::Result<()> { crate::train::run() }", 2), ["train"]);
    assert_eq!(layers("#[cfg(test)]\nmod tests { use crate::networks::by_name; }", 2), ["networks"]);
    assert_eq!(layers("use super::super::model::Model;", 2), ["model"]);
    assert_eq!(layers("use crate::unlisted::Thing;", 2), ["unlisted"]);
    let found = violations("ops", "//! Text.\n\nuse crate::device::View;\nuse crate::cli::Cli;", 2);
    assert_eq!(found, [Import { line: 4, layer: "cli".into() }]);
}

#[test]
fn what_points_down_or_is_no_code_is_no_import() {
    let fine = "//! See [`crate::engine::Engine`].\n\
        use crate::device::{View, driver::Driver};\n\
        use crate::{Error, Result, dtype::Dtype};\n\
        use super::conv::ConvProblem;\n\
        /* use crate::cli::Cli; /* crate::train */ */\n\
        const TEXT: &str = \"crate::pipeline \\\" crate::io\";\n\
        const RAW: &str = r#\"crate::report \" \"#;\n\
        fn f<'a>(c: &'a char) -> bool { *c == '\"' || *c == '\\'' } // crate::shrink\n";
    assert_eq!(violations("ops", fine, 2), []);
    let seen: Vec<String> = imports(fine, 2).into_iter().map(|import| import.layer).collect();
    assert_eq!(seen, ["device", "dtype", "error"]);
    assert_eq!(violations("cli", "use crate::ops::conv; use crate::pipeline::run;", 2), []);
}
