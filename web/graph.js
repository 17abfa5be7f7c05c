/* Nodes, as the server names them. In a subgraph that is the ids of all nodes around it, and its own: 12:3. */

/** The node of that name; undefined where there is none. Ids are text: those of subgraphs need not be numbers. */
export function findNode(rootGraph, id) {
  let node;
  let graph = rootGraph;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node ?? undefined;
}

/** The names of a node: several where its subgraph is used more than once, none where it is in no graph any more. */
export function namesOf(rootGraph, node) {
  const names = [];
  const visit = (graph, before) => {
    for (const other of graph.nodes ?? []) {
      if (other === node) names.push(before + other.id);
      if (other.subgraph) visit(other.subgraph, `${before}${other.id}:`);
    }
  };
  if (rootGraph) visit(rootGraph, "");
  return names;
}

/** Puts the element of a widget where that of the same node was before the graph was loaded anew, as by Undo: Nodes 2.0
 * takes it for the same node, and leaves the old element standing. */
export function mount(element, name) {
  element.dataset.node = name;
  if (element.isConnected) return;
  setTimeout(() => {
    if (element.isConnected) return;
    for (const other of document.getElementsByClassName(element.className))
      if (other.dataset.node === name) return other.replaceWith(element);
  }, 100); // until the page is in step with the graph
}
