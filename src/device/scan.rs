//! Reads the declarations of a kernel file: its `__global__` functions with their parameters, and its instances.
//!
//! The build script includes this file too, so that a fault in a kernel file is told when the library is built, and by the
//! same words when the file is read at run time. It uses the standard library alone.

use std::fmt;
use std::path::Path;

/// What a kernel file defines.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scan {
    /// Its `__global__` functions, in order.
    pub kernels: Vec<KernelFunction>,
    /// The instances that its `// instances:` lines name, braces expanded, as name expressions.
    pub instances: Vec<String>,
}

/// A `__global__` function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFunction {
    /// Its name.
    pub name: String,
    /// Names of its template's parameters.
    pub template: Vec<String>,
    /// Its parameters, in order.
    pub parameters: Vec<Parameter>,
}

/// A parameter of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its type, or the type of what it points to, without `const`: `float`, `long long`, `T`, `ConvGeometry`.
    pub of: String,
    /// Whether it is a pointer.
    pub pointer: bool,
    /// Whether the kernel may write through it.
    pub writable: bool,
    /// Whether the comment behind it says `or null`.
    pub nullable: bool,
}

/// What is wrong with a kernel file, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The line, from 1 on.
    pub line: usize,
    /// What is wrong.
    pub problem: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.problem)
    }
}

/// Paths of all kernel files and headers below a folder, in order of name.
///
/// # Errors
/// When the folder or its folder `emulator` cannot be read.
pub fn list(root: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for folder in ["", "emulator"] {
        for entry in std::fs::read_dir(root.join(folder))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if [".cu", ".cuh", ".h"].iter().any(|end| name.ends_with(end)) {
                names.push(if folder.is_empty() { name } else { format!("{folder}/{name}") });
            }
        }
    }
    names.sort();
    Ok(names)
}

/// Reads a file of a name; one that is no `.cu` defines nothing.
///
/// # Errors
/// A kernel without an instance, an instance without a kernel, or a text that is not written as the others are.
pub fn scan(name: &str, text: &str) -> Result<Scan, Fault> {
    let mut scan = Scan::default();
    if !name.ends_with(".cu") {
        return Ok(scan);
    }
    let mut at = 0;
    let mut lines = Vec::new();
    for (number, line) in (1..).zip(text.split_inclusive('\n')) {
        let fault = |problem: String| Fault { line: number, problem };
        if line.trim_start().starts_with("__global__") {
            let start = at + line.find("__global__").unwrap_or(0);
            scan.kernels.push(kernel(text, start).map_err(fault)?);
            lines.push(number);
        }
        if let Some(pattern) = line.strip_prefix("// instances:") {
            expand(pattern.trim(), &mut scan.instances).map_err(fault)?;
        }
        at += line.len();
    }
    for (kernel, &line) in scan.kernels.iter().zip(&lines) {
        if !scan.instances.iter().any(|instance| head(instance) == kernel.name) {
            return Err(Fault { line, problem: format!("no `// instances:` line names {}", kernel.name) });
        }
    }
    if let Some(instance) = scan.instances.iter().find(|i| !scan.kernels.iter().any(|k| k.name == head(i))) {
        return Err(Fault { line: 1, problem: format!("there is no kernel for the instance {instance}") });
    }
    Ok(scan)
}

/// The kernel that an instance is of.
pub fn head(instance: &str) -> &str {
    instance.split('<').next().unwrap_or(instance).trim()
}

/// The kernel whose `__global__` stands at `start`.
fn kernel(text: &str, start: usize) -> Result<KernelFunction, String> {
    // `__global__ void __launch_bounds__(…) kernel(`: the name stands before the parenthesis of the parameters.
    let rest = &text[start + "__global__".len()..];
    let open = |rest: &str| rest.find('(').ok_or("a __global__ function without parameters");
    let (before, rest) = rest.split_at(open(rest)?);
    let (before, rest) = match before.trim_end().ends_with("__launch_bounds__") {
        false => (before, rest),
        true => {
            let rest = &rest[closing(rest)? + 1..];
            rest.split_at(open(rest)?)
        }
    };
    let name = before.split_whitespace().last().ok_or("a __global__ function without a name")?.to_owned();
    let before = &text[..start];
    let before = &before[before.rfind(['}', ';']).map_or(0, |at| at + 1)..];
    let template = before.rfind("template").map_or("", |at| before[at + "template".len()..].trim());
    let template = template.trim_start_matches('<').trim_end_matches('>').split(',');
    let template = template.filter_map(|part| part.split_whitespace().last()).map(str::to_owned).collect();
    Ok(KernelFunction { name, template, parameters: parameters(&rest[1..])? })
}

/// The parameters up to the parenthesis that closes them. A comment belongs to the last parameter before it.
fn parameters(text: &str) -> Result<Vec<Parameter>, String> {
    let mut found: Vec<Parameter> = Vec::new();
    let mut current = String::new();
    let mut open = true;
    for line in text.lines() {
        let (code, comment) = line.split_once("//").unwrap_or((line, ""));
        for c in code.chars() {
            match c {
                ',' | ')' => {
                    found.push(parameter(&std::mem::take(&mut current))?);
                    open = c == ',';
                }
                _ => current.push(c),
            }
            if !open {
                break;
            }
        }
        current.push(' ');
        if let Some(last) = found.last_mut() {
            last.nullable |= last.pointer && comment.contains("or null");
        }
        if !open {
            return Ok(found);
        }
    }
    Err("the parameters of a kernel do not end".into())
}

fn parameter(text: &str) -> Result<Parameter, String> {
    let spaced = text.replace('*', " * ");
    let words: Vec<&str> = spaced.split_whitespace().filter(|w| *w != "__restrict__").collect();
    let (name, of) = words.split_last().ok_or("a parameter without a name")?;
    let pointer = of.contains(&"*");
    // `const T* x` cannot be written through; `T* const x` can.
    let constant = of.iter().take_while(|w| **w != "*").any(|w| *w == "const");
    let of: Vec<&str> = of.iter().copied().filter(|w| !["*", "const"].contains(w)).collect();
    let odd = |word: &str| word.contains(|c: char| !c.is_alphanumeric() && c != '_');
    if of.is_empty() || odd(name) || of.iter().any(|word| odd(word)) {
        return Err(format!("{:?} is no parameter that a launch can check", text.trim()));
    }
    let writable = pointer && !constant;
    Ok(Parameter { name: (*name).to_owned(), of: of.join(" "), pointer, writable, nullable: false })
}

/// Where the parenthesis that opens `text` closes.
fn closing(text: &str) -> Result<usize, String> {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' if depth == 1 => return Ok(at),
            ')' => depth -= 1,
            _ => {}
        }
    }
    Err("a parenthesis that does not close".into())
}

/// Expands `{a,b}` as a shell does.
fn expand(pattern: &str, into: &mut Vec<String>) -> Result<(), String> {
    let Some(open) = pattern.find('{') else {
        into.push(pattern.to_owned());
        return Ok(());
    };
    let close = pattern[open..].find('}').ok_or("a brace of an instances line does not close")? + open;
    for choice in pattern[open + 1..close].split(',') {
        expand(&format!("{}{}{}", &pattern[..open], choice.trim(), &pattern[close + 1..]), into)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "// instances: f<{float,f16}, {1,2}>\n// instances: g\n\nstruct S { int a; };\n\n\
        // Why (four).\ntemplate <typename T, int K>\n__global__ void __launch_bounds__(256, blocks(K)) f(\n    \
        const T* __restrict__ x,   // [n], or more (see above)\n    const float* bias,   // [c] or null\n    \
        int n, float* y) {   // [n] or null\n}\n__global__ void g(unsigned long long a, ConvGeometry b) {}\n";

    #[test]
    fn kernels_are_read_with_their_parameters() {
        let scan = scan("a.cu", TEXT).unwrap();
        assert_eq!(scan.instances, ["f<float, 1>", "f<float, 2>", "f<f16, 1>", "f<f16, 2>", "g"]);
        let [f, g] = &scan.kernels[..] else { panic!("{scan:?}") };
        assert_eq!((f.name.as_str(), &f.template[..]), ("f", &["T".to_owned(), "K".to_owned()][..]));
        let told: Vec<_> = f.parameters.iter().map(|p| (p.of.as_str(), p.pointer, p.writable, p.nullable)).collect();
        let expected = [
            ("T", true, false, false),
            ("float", true, false, true),
            ("int", false, false, false),
            ("float", true, true, true),
        ];
        assert_eq!(told, expected);
        assert!(g.template.is_empty());
        assert_eq!(
            g.parameters.iter().map(|p| p.of.as_str()).collect::<Vec<_>>(),
            ["unsigned long long", "ConvGeometry"]
        );
    }

    #[test]
    fn a_fault_is_told_with_its_line() {
        let fault = |text: &str| scan("a.cu", text).unwrap_err().to_string();
        assert_eq!(fault("\n__global__ void f(int n) {}\n"), "line 2: no `// instances:` line names f");
        assert_eq!(fault("\n\n// instances: f<{a\n"), "line 3: a brace of an instances line does not close");
        assert_eq!(fault("// instances: f\n"), "line 1: there is no kernel for the instance f");
        assert!(fault("// instances: f\n__global__ void f(int (*n)[4]) {}\n").starts_with("line 2: "));
        assert_eq!(scan("a.cuh", "__global__ void f(").unwrap(), Scan::default());
    }
}
