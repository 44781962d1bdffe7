//! Embeds the text of `kernels/` in the library, with the list of kernels and of the instances that are compiled.
//!
//! Nothing of CUDA is needed to build: the text is compiled at run time, for the device or for the emulator.

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

fn main() {
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("set by cargo")).join("kernels");
    println!("cargo::rerun-if-changed={}", root.display());
    let mut names = Vec::new();
    for folder in ["", "emulator"] {
        for entry in fs::read_dir(root.join(folder)).expect("kernels/ is part of the package") {
            let name = entry.expect("a readable folder").file_name().into_string().expect("names are ASCII");
            if [".cu", ".cuh", ".h"].iter().any(|end| name.ends_with(end)) {
                names.push(if folder.is_empty() { name } else { format!("{folder}/{name}") });
            }
        }
    }
    names.sort();
    let mut out = String::from("/// Every file of `kernels/`.\npub static FILES: &[SourceFile] = &[\n");
    for name in names {
        let path = root.join(&name);
        let text = fs::read_to_string(&path).expect("kernel files are UTF-8");
        let (kernels, instances) = if name.ends_with(".cu") { scan(&name, &text) } else { Default::default() };
        writeln!(
            out,
            "    SourceFile {{ name: {name:?}, text: include_str!({path:?}), kernels: &{kernels:?}, instances: &{instances:?} }},"
        )
        .expect("writing to a string");
    }
    out.push_str("];\n");
    let to = Path::new(&env::var("OUT_DIR").expect("set by cargo")).join("kernels.rs");
    fs::write(to, out).expect("OUT_DIR can be written");
}

/// The kernels of a file, and the instances that its `// instances:` lines name, braces expanded.
fn scan(name: &str, text: &str) -> (Vec<String>, Vec<String>) {
    let mut kernels = Vec::new();
    let mut instances = Vec::new();
    for line in text.lines() {
        if let Some(rest) = line.trim_start().strip_prefix("__global__") {
            // `__global__ void __launch_bounds__(…) kernel(` : the name stands before the last opening parenthesis.
            let rest = rest.split("__launch_bounds__").last().expect("split gives at least one part");
            let rest = if rest.starts_with('(') { &rest[closing(rest) + 1..] } else { rest };
            let head = rest.split('(').next().expect("split gives at least one part");
            kernels.push(head.split_whitespace().last().expect("a kernel has a name").to_owned());
        }
        if let Some(pattern) = line.strip_prefix("// instances:") {
            expand(pattern.trim(), &mut instances);
        }
    }
    for kernel in &kernels {
        assert!(
            instances.iter().any(|i| i.split('<').next() == Some(kernel)),
            "kernels/{name}: no `// instances:` line names {kernel}"
        );
    }
    (kernels, instances)
}

/// Where the parenthesis that opens `text` closes.
fn closing(text: &str) -> usize {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' if depth == 1 => return at,
            ')' => depth -= 1,
            _ => {}
        }
    }
    panic!("no closing parenthesis in {text:?}")
}

/// Expands `{a,b}` as a shell does.
fn expand(pattern: &str, into: &mut Vec<String>) {
    match pattern.find('{') {
        None => into.push(pattern.to_owned()),
        Some(open) => {
            let close = open + pattern[open..].find('}').expect("braces of an instances line close");
            for choice in pattern[open + 1..close].split(',') {
                expand(&format!("{}{}{}", &pattern[..open], choice.trim(), &pattern[close + 1..]), into);
            }
        }
    }
}
